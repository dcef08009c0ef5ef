"""Perturbation of weights (AWP) and of scores (S2AP) against slow ones on plain networks."""

import contextlib
import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robsparse.baselines import harp, hydra
from robsparse.schema.threat import Crafting
from robsparse.schema.training import Fit, WeightPerturbation
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.masks import apply_masks, magnitude_masks
from robsparse.study.cells import Layout
from robsparse.study.cost import PASSES, passes_per_epoch, perturbation_passes
from robsparse.tools import planning
from robsparse.training import loop
from robsparse.training.checkpoints import Interrupted
from robsparse.training.objectives import OBJECTIVES, Attacker
from robsparse.training.stages import Run, Stage

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BETA, GAMMA = 6.0, 0.05


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return nn.Sequential(*layers).double().train()


def attacker(bn_mode):
    crafting = Crafting(steps=2, step_size=0.05, bn_mode=bn_mode)
    return Attacker(0.1, crafting, torch.Generator().manual_seed(5))


def step(name, model, bn_mode, awp, stage=None):
    """The loss of `compute_gradients`, which leaves its gradients in the model."""
    run = Run(model, 0.5, torch.Generator(), awp=awp, epoch=1)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stage = stage or Stage(Fit(epochs=1, lr=0.1))

    def objective(network, x, y, made):
        return OBJECTIVES[name](network, x, y, made, BETA)

    return loop.compute_gradients(run, stage, objective, attacker(bn_mode), (X, Y))


def plain_loss(name, model, adversarial):
    """The loss of AT and TRADES on images that are already crafted."""
    if name == "at":
        return F.cross_entropy(model(adversarial), Y)
    clean = model(X)
    divergence = F.kl_div(
        F.log_softmax(model(adversarial), 1), F.softmax(clean, 1), reduction="batchmean"
    )
    return F.cross_entropy(clean, Y) + BETA * divergence


def slow_step(name, model, bn_mode, masks=None):
    """A copy takes a step uphill; its difference, as long as gamma ||w||, moves the network."""
    made = attacker(bn_mode)
    craft = made.attack_labels if name == "at" else made.attack_outputs
    adversarial = craft(model, X, Y) if name == "at" else craft(model, X)
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-plain_loss(name, proxy, adversarial)).backward()
    optimizer.step()
    moved = {}
    with torch.no_grad():
        for (key, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
            if old.dim() > 1:
                difference = (new - old) * (masks[key.removesuffix(".weight")] if masks else 1)
                moved[key] = GAMMA * old.norm() / (difference.norm() + 1e-20) * difference
                old.add_(moved[key])
    loss = plain_loss(name, model, adversarial)
    loss.backward()
    with torch.no_grad():
        for key, difference in moved.items():
            model.get_parameter(key).sub_(difference)
    return loss.detach()


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["at", "trades"])
def test_dense_step_equals_the_one_with_a_copy_of_the_network(name, bn_mode):
    model, slow = network(), network()
    loss = step(name, model, bn_mode, WeightPerturbation(gamma=GAMMA))
    torch.testing.assert_close(loss, slow_step(name, slow, bn_mode), rtol=1e-7, atol=1e-9)
    before = network()
    for one, two, old in zip(
        model.parameters(), slow.parameters(), before.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-8)
        assert torch.equal(one, old)
    for one, two in zip(model.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)
    plain = network()
    assert step(name, plain, bn_mode, None) < loss


@pytest.mark.parametrize("name", ["at", "trades"])
def test_only_active_connections_move(name):
    """The masked network equals a plain one with the same zeros, which moves under the mask."""
    model, slow = network(), network()
    masks = magnitude_masks(model, 0.5)
    with torch.no_grad():
        for key, module in prunable(slow).items():
            module.weight.mul_(masks[key])
    apply_masks(model, masks)
    loss = step(name, model, "eval", WeightPerturbation(gamma=GAMMA))
    torch.testing.assert_close(loss, slow_step(name, slow, "eval", masks), rtol=1e-7, atol=1e-9)
    for key, module in prunable(model).items():
        assert torch.equal(module.weight != 0, masks[key])
        gradient = module.parametrizations.weight.original.grad
        expected = slow.get_parameter(f"{key}.weight").grad * masks[key]
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_warm_up_and_no_setting_change_no_bit(name):
    networks = [network() for _ in range(2)]
    losses = [
        step(name, model, "eval", awp)
        for model, awp in zip(networks, (None, WeightPerturbation(warmup=2)), strict=True)
    ]
    assert torch.equal(*losses)
    for one, two in zip(*(model.parameters() for model in networks), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("method", ["bcs"])
def test_a_perturbed_training_resumes_to_the_same_bits_and_counts_its_passes(
    method, study_data, load_study, tmp_path
):
    study_data["training"] |= {"batch_size": 200, "awp": {"gamma": 0.01, "warmup": 1}}
    study_data["grid"] |= {"methods": [method], "objectives": ["at"]}
    study_data["methods"][method]["train"]["epochs"] = 2
    study = load_study(study_data)
    (cell,), layout = study.cells(), Layout(tmp_path / "run")
    loop.train_cell(study, cell, layout, device="cpu")
    whole = layout.model(cell, "last").read_bytes()
    record = json.loads(layout.training(cell).read_text())
    steps = loop.prepare_session(study, cell, layout, torch.device("cpu")).batches.steps
    each = PASSES["at"](study.training.crafting.steps)[0]
    for kind in ("forward_passes", "backward_passes"):
        assert record["cost"][kind] == steps * (each + each + 1)
    plain = study.training.model_copy(update={"awp": None})
    assert passes_per_epoch("at", study.training) == passes_per_epoch("at", plain) + 2
    assert passes_per_epoch("trades", study.training) == passes_per_epoch("trades", plain) + 4
    layout.training(cell).unlink()
    while not layout.training(cell).exists():
        with contextlib.suppress(Interrupted):
            loop.train_cell(study, cell, layout, device="cpu", max_steps=3)
    assert layout.model(cell, "last").read_bytes() == whole


@pytest.mark.parametrize("awp", [None, WeightPerturbation(gamma=GAMMA)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_in_train_mode_are_those_that_are_counted(name, awp):
    """Crafting is in eval mode, so its passes are not among them."""
    model, seen = network(), []
    model.register_forward_pre_hook(lambda module, given: seen.append(module.training))
    step(name, model, "eval", awp)
    passes = PASSES[name](0)[1]
    assert sum(seen) == (2 * passes if awp else passes)


def test_a_penalty_is_evaluated_at_the_perturbed_weights():
    """As docs/baselines.md says of ADMM. It does not change the perturbation."""
    seen = {}

    class Penalised(Stage):
        def penalty(self, run):
            weights = {name: module.weight for name, module in prunable(run.model).items()}
            seen.update({name: weight.detach().clone() for name, weight in weights.items()})
            return sum(100 * weight.square().sum() for weight in weights.values())

    losses, gradients = [], []
    for stage in (Stage(Fit(epochs=2, lr=0.1)), Penalised(Fit(epochs=2, lr=0.1))):
        model = network()
        losses.append(step("at", model, "eval", WeightPerturbation(gamma=GAMMA), stage))
        gradients.append([module.weight.grad for module in prunable(model).values()])
    assert losses[1] - losses[0] == pytest.approx(
        sum(100 * w.square().sum() for w in seen.values())
    )
    for (name, module), plain, own in zip(prunable(network()).items(), *gradients, strict=True):
        before = module.weight.detach()
        moved = float((seen[name] - before).norm())
        assert moved == pytest.approx(GAMMA * float(before.norm()))
        torch.testing.assert_close(own - plain, 200 * seen[name])


# ---------------------------------------------------------------- S2AP


def scored(method, s2ap, warmup=1):
    """A network in the prune stage, its stage, and the weights and scores of each layer."""
    settings = {"epochs": 3, "s2ap": {"gamma": 0.3, "warmup": warmup} if s2ap else None}
    params = {"hydra": hydra, "harp": harp}[method].Params(prune=settings)
    stage = (hydra if method == "hydra" else harp).stages(params)[0]
    model = network()
    stage.before_fit(Run(model, 0.5, torch.Generator()))
    torch.manual_seed(4)
    found = {}
    for name, module in prunable(model).items():
        mask = module.parametrizations.weight[0]
        mask.score.data.copy_(torch.randn(mask.score.shape))
        weight = module.parametrizations.weight.original.detach().clone()
        found[name] = (weight, mask.score.detach().clone())
    return model, stage, found


def kept(score, model, name):
    """The mask of the largest |score|, from a sorted list."""
    mask = prunable(model)[name].parametrizations.weight[0]
    count = mask.k if hasattr(mask, "k") else int((prunable(model)[name].weight != 0).sum())
    size = score.abs().flatten().tolist()
    chosen = sorted(range(len(size)), key=lambda i: -size[i])[:count]
    return torch.tensor([float(i in chosen) for i in range(len(size))]).view(score.shape).double()


@pytest.mark.parametrize("name", ["at", "trades"])
@pytest.mark.parametrize("method", ["hydra", "harp"])
def test_scores_get_the_gradients_at_the_worst_scores_nearby(method, name):
    """By hand: weights times masks in a plain network, one step uphill in each layer."""
    model, stage, layers = scored(method, s2ap=True)
    masks = {key: kept(score, model, key) for key, (_, score) in layers.items()}

    def plain(masks):
        slow = network()
        with torch.no_grad():
            for key, module in prunable(slow).items():
                module.weight.copy_(layers[key][0] * masks[key])
        return slow

    slow = plain(masks)
    made = attacker("eval")
    images = made.attack_labels(slow, X, Y) if name == "at" else made.attack_outputs(slow, X)
    plain_loss(name, slow, images).backward()
    moved = {}
    for key, (weight, score) in layers.items():
        gradient = prunable(slow)[key].weight.grad * weight * score.sign()
        moved[key] = score + 0.3 * score.norm() * gradient / gradient.norm()
    worst = {key: kept(score, model, key) for key, score in moved.items()}
    assert any(not torch.equal(worst[key], masks[key]) for key in masks)
    slow = plain(worst)
    expected = plain_loss(name, slow, images)
    expected.backward()
    loss = step(name, model, "eval", None, stage)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-10)
    for key, module in prunable(model).items():
        mask = module.parametrizations.weight[0]
        through = prunable(slow)[key].weight.grad * layers[key][0]
        torch.testing.assert_close(mask.score.grad, through * moved[key].sign())
        assert torch.equal(mask.score, layers[key][1])
        assert torch.equal(module.weight, layers[key][0] * masks[key])
        if method == "harp":
            share = torch.sigmoid(mask.rate)
            slope = (1 - mask.least) * share * (1 - share)
            penalty = stage.penalty(Run(model, 0.5, torch.Generator()))
            own = torch.autograd.grad(penalty, mask.rate, allow_unused=True)[0]
            torch.testing.assert_close(mask.rate.grad, through.sum() * slope + own)
    for one, two in zip(model.buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["hydra", "harp"])
def test_s2ap_does_nothing_in_its_warm_up_and_if_it_is_off(method):
    found = []
    for s2ap, warmup in ((False, 1), (True, 2), (True, 1)):
        model, stage, _ = scored(method, s2ap, warmup)
        loss = step("at", model, "eval", None, stage)
        found.append((loss, *(p.grad for p in stage.parameters(model))))
    off, warming, on = found
    assert all(torch.equal(one, two) for one, two in zip(off, warming, strict=True))
    assert not torch.equal(off[0], on[0])


@pytest.mark.parametrize("awp", [None, WeightPerturbation(gamma=GAMMA)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_of_s2ap_are_those_that_are_counted(name, awp):
    model, stage, layers = scored("hydra", s2ap=True)
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(module.training))
    step(name, model, "eval", awp, stage)
    assert sum(seen) == PASSES[name](0)[1] + (2 if awp else 1) * perturbation_passes(name)
    for key, module in prunable(model).items():  # everything is restored
        assert torch.equal(module.parametrizations.weight[0].score, layers[key][1])


@pytest.mark.parametrize("method", ["hydra", "harp"])
def test_s2ap_resumes_to_the_same_bits_and_its_passes_are_in_the_record(
    method, study_data, load_study, tmp_path
):
    study_data["training"]["batch_size"] = 200
    study_data["grid"] |= {"methods": ["dense", method], "objectives": ["trades"]}
    study_data["methods"]["dense"] = {"pretrain": {"epochs": 1, "lr": 0.1}}
    s2ap = {"gamma": 0.05, "warmup": 1}
    study_data["methods"][method] = {
        "prune": {"epochs": 3, "s2ap": s2ap},
        "finetune": {"epochs": 1},
    }
    study = load_study(study_data)
    cells, layout = study.cells(), Layout(tmp_path / "run")
    (cell,) = (cell for cell in cells if cell.method == method)
    loop.train_cell(study, study.starting_cell(cell), layout, device="cpu")
    loop.train_cell(study, cell, layout, device="cpu")
    whole = layout.model(cell, "last").read_bytes()
    cost = json.loads(layout.training(cell).read_text())["cost"]
    steps = loop.prepare_session(study, cell, layout, torch.device("cpu")).batches.steps
    for kind, each in zip(
        ("forward_passes", "backward_passes"),
        PASSES["trades"](study.training.crafting.steps),
        strict=True,
    ):  # one dense epoch, three of scores, one of finetuning; two of these with perturbed scores
        assert cost[kind] == steps * (5 * each + 2 * 2)
    layout.training(cell).unlink()
    while not layout.training(cell).exists():
        with contextlib.suppress(Interrupted):
            loop.train_cell(study, cell, layout, device="cpu", max_steps=3)
    assert layout.model(cell, "last").read_bytes() == whole


def test_s2ap_needs_a_gamma_and_a_warm_up_that_ends(study_data, refused):
    study_data["grid"]["methods"] = ["dense", "hydra"]
    study_data["methods"]["hydra"] = {"prune": {"epochs": 5, "s2ap": {"gamma": 0.1}}}
    assert refused(study_data) == (
        'methods.hydra.prune.s2ap = {"gamma": 0.1}: expected s2ap.warmup of fewer epochs than '
        "the 5 of the stage"
    )
    study_data["methods"]["hydra"]["prune"] = {"s2ap": {}}
    assert "methods.hydra.prune.s2ap.gamma" in refused(study_data)


@pytest.mark.parametrize(
    ("objective", "each", "further"), [("at", 6, 2), ("trades", 9, 4), ("natural", 2, 2)]
)
def test_a_budget_in_passes_counts_s2ap_in_all_epochs_of_its_stage(
    objective, each, further, study_data, load_study
):
    """Two crafting steps and a training pass, both ways; one dense epoch."""
    study_data["grid"] |= {"methods": ["dense", "hydra"], "objectives": [objective]}
    study_data["methods"]["dense"] = {"pretrain": {"epochs": 1, "lr": 0.1}}
    s2ap = {"gamma": 0.1, "warmup": 1}
    study_data["methods"]["hydra"] = {"prune": {"epochs": 5}, "finetune": {"epochs": 15}}
    epochs = {}
    for settings in (None, s2ap):
        study_data["methods"]["hydra"]["prune"]["s2ap"] = settings
        study_data["grid"]["budget"] = {"unit": "passes", "total": 41 * each}
        study = load_study(study_data)
        (planned,) = (p for cell, p in study.planned.items() if cell.method == "hydra")
        epochs[bool(settings)] = {name: fit.epochs for name, fit in planned.stages.items()}
    assert epochs[False] == {"prune": 11, "finetune": 29}
    prune, finetune = epochs[True].values()
    spent = (1 + prune + finetune) * each + prune * further
    assert 41 * each - (each + further) < spent <= 41 * each


def test_the_plan_has_the_time_of_perturbed_scores(study_data, load_study):
    study_data["grid"] |= {"methods": ["dense", "hydra"], "objectives": ["trades"]}
    seconds = []
    for settings in (None, {"gamma": 0.1, "warmup": 1}):
        study_data["methods"]["hydra"]["prune"] = {"epochs": 3, "s2ap": settings}
        study = load_study(study_data)
        clock = SimpleNamespace(
            study=study,
            data=planning.Clock(study).data,
            step=lambda cell: 1.0,
            forward=lambda cell: 1.0,
            gradient=lambda cell: 1.0,
        )
        (cell,) = (cell for cell in study.cells() if cell.method == "hydra")
        seconds.append(planning.training_seconds(clock, cell) - planning.SECONDS_TO_START_A_JOB)
    # Four epochs of steps; three of them have two more gradient passes.
    assert seconds[1] / seconds[0] == pytest.approx((4 + 3 * 2) / 4)


# ---------------------------------------------------------------- number formats


def test_bf16_passes_use_the_perturbed_weights_and_not_a_cast_of_the_old_ones():
    """Autocast keeps casts of weights. A stale one would give the loss without perturbation."""
    losses = []
    for awp in (None, WeightPerturbation(gamma=0.5)):
        run = Run(network().float(), 0.5, torch.Generator(), precision="bf16", awp=awp)
        run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)

        def objective(model, x, y, made):
            return F.cross_entropy(model(x).float(), y)

        stage = Stage(Fit(epochs=1, lr=0.1))
        batch = (X.float(), Y)
        losses.append(loop.compute_gradients(run, stage, objective, attacker("eval"), batch))
    assert losses[1] > losses[0] + 0.01
