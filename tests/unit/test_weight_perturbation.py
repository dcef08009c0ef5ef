"""Adversarial weight perturbation against a slow one on copies of the network."""

import contextlib
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robsparse.schema.threat import Crafting
from robsparse.schema.training import Fit, WeightPerturbation
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.masks import apply_masks, magnitude_masks
from robsparse.study.cells import Layout
from robsparse.study.cost import PASSES, passes_per_epoch
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


def step(name, model, bn_mode, awp):
    """The loss of `compute_gradients`, which leaves its gradients in the model."""
    run = Run(model, 0.5, torch.Generator(), awp=awp)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stage = Stage(Fit(epochs=1, lr=0.1))

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
        for model, awp in zip(networks, (None, WeightPerturbation(warmup=1)), strict=True)
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
