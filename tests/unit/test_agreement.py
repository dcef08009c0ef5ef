"""Our attacks against the published packages, image by image."""

import json
import os
from pathlib import Path

import foolbox
import numpy as np
import pyautoattack
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.compute import perturb
from robsparse.compute.perturb import length
from robsparse.eval import autoattack, fgsm, fmn, pgd, square, transfer
from robsparse.evaluation.attacks import AttackContext
from robsparse.evaluation.cache import Cache
from robsparse.networks import weights

CPU = torch.device("cpu")
EPS = 0.1
WEIGHTS = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
JPEG = "ROBSPARSE_CIFAR10_JPEG"  # folder of real images to use instead of seeded ones


def attack_context(norm="Linf", eps=EPS, batch_size=40, **changes):
    changes = {"report": lambda text: None} | changes
    return AttackContext(norm, eps, 3, batch_size, CPU, **changes)


class Quick(AutoAttack):
    """AutoAttack with a fraction of its steps and queries."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.square.n_queries = 100
        self.fab.n_iter = 5
        self.apgd.n_iter = self.apgd_targeted.n_iter = 5
        self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 4


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(autoattack, "AutoAttack", Quick)


def stock(kind, model, images, context, names):
    """Return the survivors of one call of the package."""
    attack = kind(
        model, norm=context.norm, eps=context.eps, version="standard", seed=3, device="cpu"
    )
    attack.attacks_to_run = list(names)
    x, y = images
    with torch.random.fork_rng():
        _, y_adv = attack.run_standard_evaluation(x, y, batch_size=context.batch_size)
    model.zero_grad(set_to_none=True)
    return y_adv == y


# ---------------------------------------------------------------- AutoAttack


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.6)])
@pytest.mark.parametrize("batch_size", [50, 200])
def test_cascade_equals_one_stock_call(norm, eps, batch_size, quick, known_network):
    model, part = known_network
    context = attack_context(norm, eps, batch_size)
    found = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), context)
    expected = stock(Quick, model, (part.x_NCHW, part.y_N), context, found.components)
    flags = list(found.components.values())
    assert torch.equal(flags[-1], expected)
    assert (
        len(part) > int(flags[0].sum()) > int(flags[-1].sum()) > 0
    )  # otherwise the test shows little
    assert found.max_perturbation == pytest.approx(eps, abs=1e-5)


def test_whole_standard_version_on_some_images(known_network):
    """With all steps and queries of the package."""
    model, part = known_network
    x, y = part.x_NCHW[:12], part.y_N[:12]
    found = autoattack.run(model, x, y, autoattack.Params(), attack_context())
    expected = stock(AutoAttack, model, (x, y), attack_context(), found.components)
    assert torch.equal(list(found.components.values())[-1], expected)
    assert 0 < int(expected.sum()) < 12


def real_images() -> tuple[torch.Tensor, torch.Tensor] | None:
    folder = os.environ.get(JPEG)
    if not folder:
        return None
    data = registry.load("dataset", "imagefolder")
    params = registry.entry("dataset", "imagefolder").params(data_dir=folder)
    test = data.load(params).test
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:8]
    return test.x_NCHW[chosen], test.y_N[chosen]


def shipped() -> nn.Module:
    """The CIFAR-10 ResNet-18 that comes with the package, in our own architecture."""
    model = models.build("resnet18", registry.entry("arch", "resnet18").params(), (3, 32, 32), 10)
    weights.load_into(model, WEIGHTS, "order")
    return model.eval()


def test_shipped_resnet_survivors_equal_the_stock_packages(quick):
    model = shipped()
    found = real_images()
    if found is None:
        x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        x = nn.functional.interpolate(x, size=32, mode="bilinear")
        with torch.no_grad():
            found = x, model(x).argmax(1)
    x, y = found
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    context = attack_context(eps=0.5 / 255, batch_size=5)
    ours = autoattack.run(model, x, y, autoattack.Params(), context).components
    assert torch.equal(ours["square"], stock(Quick, model, (x, y), context, ours))
    assert 0 < int(ours["square"].sum()) < len(y)


def test_subset_of_components_gives_the_intermediate_result_of_all(quick, known_network):
    model, part = known_network
    whole = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context())
    params = autoattack.Params(components=("apgd-ce", "apgd-t"))
    some = autoattack.run(model, part.x_NCHW, part.y_N, params, attack_context())
    assert list(some.components) == ["apgd-ce", "apgd-t"]
    for name, flags in some.components.items():
        assert torch.equal(flags, whole.components[name])


def test_rand_version_equals_the_package(monkeypatch, known_network):
    class Short(AutoAttack):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.apgd.n_iter, self.apgd.eot_iter = 3, 2

    monkeypatch.setattr(autoattack, "AutoAttack", Short)
    model, part = known_network
    params = autoattack.Params(version="rand")
    found = autoattack.run(model, part.x_NCHW, part.y_N, params, attack_context())
    attack = Short(model, norm="Linf", eps=EPS, version="rand", seed=3, device="cpu")
    with torch.random.fork_rng():
        _, y_adv = attack.run_standard_evaluation(part.x_NCHW, part.y_N, batch_size=40)
    model.zero_grad(set_to_none=True)
    assert torch.equal(found.components["apgd-dlr"], y_adv == part.y_N)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"components": ["fab"]}, "expected each at most once of: apgd-ce, apgd-t, fab-t, square"),
        ({"components": ["square", "square"]}, "expected each at most once"),
        ({"version": "rand", "components": ["square"]}, "of: apgd-ce, apgd-dlr"),
    ],
)
def test_components_that_are_not_in_a_version_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        autoattack.Params(**values)


# ---------------------------------------------------------------- killed and resumed


class Killed(Exception):
    """Simulates a killed process."""


def outcome_of(found):
    flags = {name: value.tolist() for name, value in found.components.items()}
    pictures = {i: (p.predicted, p.image.half().tolist()) for i, p in found.pictures.items()}
    return flags, pictures, found.warnings, found.max_perturbation, found.nan_count


@pytest.mark.parametrize("kills", [1, 3, 6, 9])
def test_killed_and_resumed_evaluation_equals_an_uninterrupted_one(
    kills, quick, known_network, tmp_path, monkeypatch
):
    model, part = known_network
    whole = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context())
    saved = Cache(tmp_path, "network")
    calls, killed = [], []
    searcher = autoattack._searcher

    def counted(package, name):
        search = searcher(package, name)

        def once(x, y):
            calls.append(name)
            if len(calls) == kills and not killed:
                killed.append(name)
                raise Killed
            return search(x, y)

        return once

    monkeypatch.setattr(autoattack, "_searcher", counted)
    context = attack_context(cache=saved)
    with pytest.raises(Killed):
        autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), context)
    found = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), context)
    assert outcome_of(found) == outcome_of(whole)
    calls_of_both = len(calls)
    calls.clear()
    autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context())
    assert calls_of_both == len(calls) + 1  # only the interrupted batch runs twice


def test_longer_evaluation_uses_the_cache_of_a_shorter_one(
    quick, known_network, tmp_path, monkeypatch
):
    model, part = known_network
    saved = Cache(tmp_path, "network")
    short = autoattack.Params(components=("apgd-ce", "apgd-t"))
    autoattack.run(model, part.x_NCHW, part.y_N, short, attack_context(cache=saved))
    ran = []
    searcher = autoattack._searcher

    def counted(package, name):
        ran.append(name)
        search = searcher(package, name)
        if name in ("apgd-ce", "apgd-t"):
            return lambda x, y: pytest.fail(f"{name} ran again")
        return search

    monkeypatch.setattr(autoattack, "_searcher", counted)
    reports = []
    context = attack_context(cache=saved, report=reports.append)
    found = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), context)
    assert any("taken from an earlier run" in text for text in reports)
    monkeypatch.undo()
    monkeypatch.setattr(autoattack, "AutoAttack", Quick)
    whole = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context())
    assert outcome_of(found) == outcome_of(whole)


def test_outcome_after_other_components_is_not_used(quick, known_network, tmp_path):
    model, part = known_network
    saved = Cache(tmp_path, "network")
    alone = autoattack.Params(components=("square",))
    first = autoattack.run(model, part.x_NCHW, part.y_N, alone, attack_context(cache=saved))
    whole = autoattack.run(
        model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context(cache=saved)
    )
    assert int(whole.components["square"].sum()) < int(first.components["square"].sum())
    assert len({json.dumps(f.tolist()) for f in whole.components.values()}) > 1


def test_out_of_memory_halves_the_batches_of_a_component(quick, known_network, monkeypatch):
    model, part = known_network
    searcher = autoattack._searcher

    def tight(package, name):
        search = searcher(package, name)

        def once(x, y):
            if len(x) > 20:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return search(x, y)

        return once

    monkeypatch.setattr(autoattack, "_searcher", tight)
    reports = []
    found = autoattack.run(
        model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context(report=reports.append)
    )
    monkeypatch.setattr(autoattack, "_searcher", searcher)
    small = autoattack.run(
        model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context(batch_size=20)
    )
    assert outcome_of(found)[0] == outcome_of(small)[0]
    assert "out of memory: batches of 20 images from here on" in reports


# ---------------------------------------------------------------- PGD, FGSM, FMN


class Given(foolbox.attacks.LinfPGD):
    """PGD of foolbox with a given start."""

    start: torch.Tensor

    def get_random_start(self, x0, epsilon):
        return type(x0)(self.start)


class GivenL2(foolbox.attacks.L2PGD):
    start: torch.Tensor
    get_random_start = Given.get_random_start


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.6)])
def test_pgd_breaks_the_images_that_foolboxs_breaks(norm, eps, known_network):
    model, part = known_network
    params = pgd.Params(steps=20, restarts=1)
    ours = pgd.run(model, part.x_NCHW, part.y_N, params, attack_context(norm, eps)).components[
        "all"
    ]
    kind = Given if norm == "Linf" else GivenL2
    theirs = kind(abs_stepsize=2.5 * eps / 20, steps=20, random_start=True)
    generator = torch.Generator().manual_seed(3)
    theirs.start = perturb.uniform_start(part.x_NCHW, eps, generator, norm)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, _, broken = theirs(wrapped, part.x_NCHW, part.y_N, epsilons=eps)
    model.zero_grad(set_to_none=True)
    assert int((ours != ~broken).sum()) <= len(part) / 200
    assert 0 < int(ours.sum()) < len(part)


def test_fgsm_is_foolboxs(known_network):
    model, part = known_network
    ours = fgsm.run(model, part.x_NCHW, part.y_N, fgsm.Params(), attack_context()).components["all"]
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.FGSM()
    _, _, broken = attack(wrapped, part.x_NCHW, part.y_N, epsilons=EPS)
    model.zero_grad(set_to_none=True)
    assert torch.equal(ours, ~broken)


def test_cosine_step_sizes(known_network):
    model, part = known_network
    steps = {"steps": 10, "restarts": 1}
    each = (pgd.Params(**steps), pgd.Params(rule="cosine", relative_step=5, **steps))
    found = [pgd.run(model, part.x_NCHW, part.y_N, params, attack_context()) for params in each]
    counts = [int(outcome.components["all"].sum()) for outcome in found]
    assert abs(counts[0] - counts[1]) <= 20
    sizes = pgd._step_sizes(pgd.Params(steps=4, rule="cosine"), 0.4)
    assert sizes == pytest.approx(
        [0.25, 0.25 * (1 + 0.5**0.5) / 2, 0.125, 0.25 * (1 - 0.5**0.5) / 2]
    )


def test_start_at_the_image_is_the_same_for_every_seed(known_network):
    model, part = known_network
    params = pgd.Params(steps=3, restarts=1, start="image")
    one = pgd.run(model, part.x_NCHW, part.y_N, params, attack_context())
    other = pgd.run(model, part.x_NCHW, part.y_N, params, AttackContext("Linf", EPS, 99, 40, CPU))
    assert torch.equal(one.components["all"], other.components["all"])


class Line(nn.Module):
    """Logits (-t, t), t = tanh(3m), m = w.(x - 1/2): the boundary is |m| over w's dual norm away.

    (A straight line to the boundary falls short of it by rounding, and FMN never goes further.)
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.25]))

    def forward(self, x):
        score = torch.tanh(3 * (x.flatten(1) - 0.5) @ self.weight)
        return torch.stack([-score, score], 1)


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_smallest_perturbations_of_a_linear_network_are_known(norm, dual):
    model, margins = Line().eval(), torch.tensor([0.3, -0.2, 0.05, -0.4])
    direction = model.weight.detach() / model.weight.detach().square().sum()
    x = (0.5 + margins[:, None] * direction).view(-1, 1, 2, 2)
    y = (margins > 0).long()
    params = fmn.Params(steps=300, max_stepsize=0.3)
    found = fmn.run(model, x, y, params, attack_context(norm, 0.1))
    expected = margins.abs() / model.weight.detach().norm(dual)
    assert torch.allclose(found.distances, expected, rtol=0.03)
    assert found.components["all"].tolist() == (expected > 0.1).tolist()
    assert found.max_perturbation <= 0.1


def test_minimum_norm_attack_agrees_with_autoattack_about_most_images(quick, known_network):
    model, part = known_network
    distances = fmn.run(
        model, part.x_NCHW, part.y_N, fmn.Params(steps=200), attack_context()
    ).distances
    robust = autoattack.run(model, part.x_NCHW, part.y_N, autoattack.Params(), attack_context())
    flags = list(robust.components.values())[-1]
    assert int((flags != (distances > EPS)).sum()) <= 20  # both searches are short here


# ---------------------------------------------------------------- black box


def test_square_alone_finds_what_autoattacks_square_finds(quick, known_network):
    model, part = known_network
    params = autoattack.Params(components=("square",))
    theirs = autoattack.run(model, part.x_NCHW, part.y_N, params, attack_context())
    ours = square.run(model, part.x_NCHW, part.y_N, square.Params(queries=100), attack_context())
    assert torch.equal(ours.components["all"], theirs.components["square"])


def test_transfer_uses_the_attacked_network_once_for_each_image(known_network):
    model, part = known_network
    surrogate = nn.Sequential(model, nn.Identity())
    seen, asked = [], []
    hook = model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))

    def network(name):
        asked.append(name)
        return surrogate

    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    params = transfer.Params(surrogate="mine", steps=5)
    outcome = transfer.run(other, part.x_NCHW, part.y_N, params, attack_context(surrogate=network))
    hook.remove()
    assert asked == ["mine"]
    assert sum(seen) == 5 * len(part)  # crafted only on the surrogate
    assert outcome.max_perturbation <= EPS + 1e-6
    same = transfer.run(model, part.x_NCHW, part.y_N, params, attack_context(surrogate=network))
    white = pgd.run(model, part.x_NCHW, part.y_N, pgd.Params(steps=5, restarts=1), attack_context())
    assert torch.equal(same.components["all"], white.components["all"])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eps", [0.05, 0.8])
def test_starts_and_iterates_stay_in_ball_and_box(norm, eps, known_network):
    model, part = known_network
    generator = torch.Generator().manual_seed(0)
    start = perturb.uniform_start(part.x_NCHW, eps, generator, norm)
    found = perturb.ascend(
        model,
        part.x_NCHW,
        start,
        perturb.cross_entropy_of(part.y_N),
        eps=eps,
        step_size=eps,
        steps=3,
        norm=norm,
    )
    for x in (start, found):
        assert x.min() >= 0
        assert x.max() <= 1
        assert length(x - part.x_NCHW, norm).max() <= eps + 1e-5


def test_uniform_start_of_l2_fills_the_ball_evenly():
    x = torch.full((40_000, 1, 1, 2), 0.5)
    radius = length(perturb.uniform_start(x, 0.3, torch.Generator().manual_seed(0), "L2") - x, "L2")
    for share in (0.25, 0.5, 0.75):
        inside = float((radius <= 0.3 * share**0.5).float().mean())
        assert inside == pytest.approx(share, abs=0.01)
    assert np.isclose(float(radius.max()), 0.3, atol=1e-3)
