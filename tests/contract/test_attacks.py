"""Every registered attack reports correct results and does not change model and program."""

import copy

import pytest
import torch

from robsparse import models
from robsparse.base import registry
from robsparse.datasets import Part
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.runner import attack_model
from robsparse.evaluation.tally import correct_flags
from robsparse.schema.threat import Crafting
from robsparse.study.planned import Attack
from robsparse.training import objectives

ATTACKS = registry.names("attack")
CPU = torch.device("cpu")
EPS = 0.08
IMAGES = 8
CLASSES = 10


@pytest.fixture(autouse=True)
def _fewer_queries(monkeypatch):
    """AutoAttack with a fraction of its steps and queries."""
    module = registry.load("attack", "autoattack")

    class Quick(module.AutoAttack):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.square.n_queries = 50
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10

    monkeypatch.setattr(module, "AutoAttack", Quick)


@pytest.fixture
def known(_trained):
    """Return a copy, so that no attack can change the inputs of the next one."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="module")
def _trained():
    """A small trained network, and images that it classifies correctly.

    At EPS some of the images withstand every attack and some do not.
    """
    params = registry.entry("arch", "small_cnn").params
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = models.build("small_cnn", params(width=4), (1, 8, 8), CLASSES)
    centres = torch.rand(CLASSES, 1, 8, 8, generator=generator)
    y = torch.arange(CLASSES).repeat(20)
    x = (centres[y] + 0.2 * torch.randn(len(y), 1, 8, 8, generator=generator)).clamp(0, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    crafting = Crafting(steps=1, step_size=0.1)
    attacker = objectives.Attacker(0.05, crafting, generator)
    for _ in range(40):
        optimizer.zero_grad()
        objectives.natural(model, x, y, attacker, 0.0).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    part = Part(x, y)
    right = correct_flags(model.eval(), part, len(y), CPU).nonzero().squeeze(1)
    return model, Part(x[right], y[right])


def attack(name, model, x_NCHW, y_N, *, seed=5, batch_size=3, eps=EPS) -> Outcome:
    eps = 0.0 if name == "clean" else eps
    surrogate = copy.deepcopy(model)
    context = AttackContext(
        "Linf",
        eps,
        seed,
        batch_size,
        CPU,
        report=lambda text: None,
        surrogate=lambda wanted: surrogate,
    )
    params = registry.entry("attack", name).params()
    return registry.load("attack", name).run(model, x_NCHW, y_N, params, context)


def few(known, n=IMAGES):
    model, part = known
    return model, part.x_NCHW[:n], part.y_N[:n]


def same(one: Outcome, other: Outcome) -> bool:
    return list(one.components) == list(other.components) and all(
        torch.equal(flags, other.components[name]) for name, flags in one.components.items()
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_file_has_a_label_and_counts_its_passes(name):
    entry = registry.entry("attack", name)
    assert entry.literals["LABEL"].strip()
    backward, forward = registry.load("attack", name).passes(entry.params())
    assert backward >= 0
    assert forward > 0


@pytest.mark.parametrize("n", [0, 1, IMAGES])
@pytest.mark.parametrize("name", ATTACKS)
def test_flags_are_one_bool_for_each_image_and_robust_images_never_increase(name, n, known):
    outcome = attack(name, *few(known, n))
    assert outcome.components
    before = torch.ones(n, dtype=torch.bool)
    for flags in outcome.components.values():
        assert flags.dtype == torch.bool
        assert flags.shape == (n,)
        assert flags.device == CPU
        assert not (flags & ~before).any()
        before = flags
    assert outcome.nan_count == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_perturbation_stays_within_eps(name, known):
    outcome = attack(name, *few(known))
    assert outcome.max_perturbation is not None
    eps = 0.0 if name == "clean" else EPS
    assert 0.0 <= outcome.max_perturbation <= eps + 1e-6


@pytest.mark.parametrize("name", ATTACKS)
def test_model_gets_only_images_in_the_unit_box(name, known):
    model, x, y = few(known)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach().aminmax())
    )
    try:
        attack(name, model, x, y)
    finally:
        hook.remove()
    assert seen
    assert min(float(low) for low, _ in seen) >= -1e-6
    assert max(float(high) for _, high in seen) <= 1 + 1e-6


@pytest.mark.parametrize("name", ATTACKS)
def test_same_seed_gives_the_same_outcome_in_any_random_state(name, known):
    torch.manual_seed(1)
    one = attack(name, *few(known))
    torch.manual_seed(2)
    other = attack(name, *few(known))
    assert same(one, other)
    assert one.max_perturbation == other.max_perturbation
    assert one.warnings == other.warnings


@pytest.mark.parametrize("name", ATTACKS)
def test_global_random_state_is_not_changed(name, known):
    before = torch.get_rng_state()
    attack(name, *few(known))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ATTACKS)
def test_model_and_images_are_not_changed(name, known):
    model, x, y = few(known)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = x.clone(), y.clone()
    attack(name, model, x, y)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(x, images)
    assert torch.equal(y, labels)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"clean"}))
def test_tiny_eps_breaks_nothing_and_large_eps_breaks_everything(name, known):
    weak = attack(name, *few(known), eps=1e-6)
    strong = attack(name, *few(known), eps=0.9)
    assert list(weak.components.values())[-1].all()
    assert not list(strong.components.values())[-1].any()


def test_clean_finds_the_images_that_are_classified_correctly(known):
    model, x, y = few(known)
    wrong = y.clone()
    wrong[::2] = (y[::2] + 1) % CLASSES
    assert attack("clean", model, x, wrong).components["all"].tolist() == (wrong == y).tolist()


def test_pgd_does_not_depend_on_the_batch_size(known):
    assert same(
        attack("pgd", *few(known), batch_size=3), attack("pgd", *few(known), batch_size=100)
    )


# ---------------------------------------------------------------- through the evaluation


def evaluate(known, labels, name):
    model, part = known
    attacks = [
        Attack(n, n, registry.entry("attack", n).params(), "Linf", eps)
        for n, eps in (("clean", 0.0), (name, EPS))
    ]
    examples = Part(part.x_NCHW[: len(labels)], labels)
    return attack_model(
        model,
        examples,
        attacks,
        seed=0,
        batch_size=3,
        device=CPU,
        surrogate=lambda wanted: copy.deepcopy(model),
    )


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"clean"}))
def test_attacked_accuracy_is_never_above_clean_accuracy(name, known):
    _, part = known
    labels = part.y_N[:IMAGES].clone()
    labels[::3] = (labels[::3] + 1) % CLASSES
    clean, attacked = evaluate(known, labels, name)
    assert (clean.robust["all"] == (labels == part.y_N[:IMAGES])).all()
    for flags in attacked.robust.values():
        assert flags.shape == clean.robust["all"].shape
        assert not (flags & ~clean.robust["all"]).any()


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"clean"}))
def test_model_that_is_always_wrong_can_be_attacked(name, known):
    _, part = known
    _, attacked = evaluate(known, (part.y_N[:IMAGES] + 1) % CLASSES, name)
    assert attacked.robust["all"].tolist() == [False] * IMAGES


def test_known_network_is_partly_robust(known):
    """Otherwise, the tests above would show little."""
    assert 0 < int(attack("pgd", *few(known)).components["all"].sum()) < IMAGES
