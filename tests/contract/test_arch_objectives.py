"""One training step of every architecture under every objective, dense and sampled."""

import functools

import pytest
import torch
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.method import bcs
from robsparse.schema.threat import Crafting
from robsparse.sparsity.layers import nonzero_count, prunable
from robsparse.sparsity.masks import effective_weights
from robsparse.training import objectives
from robsparse.training.stages import Run

ARCHS = registry.names("arch")
SHAPE, CLASSES = (3, 16, 16), 5


@functools.cache
def network(arch: str) -> nn.Module:
    """Build once. A step changes the network, but this does not matter for the next step."""
    torch.manual_seed(0)
    return models.build(arch, registry.entry("arch", arch).params(), SHAPE, CLASSES)


def step(model: nn.Module, objective: str) -> float:
    """Return loss and gradients of one batch of random images."""
    generator = torch.Generator().manual_seed(0)
    attacker = objectives.Attacker(8 / 255, Crafting(steps=1, step_size=2 / 255), generator)
    x_NCHW = torch.rand(4, *SHAPE, generator=generator)
    y_N = torch.arange(4)
    model.train()
    with effective_weights(model):
        loss = objectives.OBJECTIVES[objective](model, x_NCHW, y_N, attacker, 6.0)
        model.zero_grad()
        loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_gives_every_parameter_a_gradient(arch, objective):
    model = network(arch)
    loss = step(model, objective)
    assert 0 < loss < 1e3
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, module in prunable(model).items():
        assert module.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "arch", [a for a in ARCHS if not a.endswith("_10")]
)  # like the smaller ones
def test_a_sampled_step_keeps_the_budget(arch):
    model = models.build(arch, registry.entry("arch", arch).params(), SHAPE, CLASSES)
    stage = bcs.SamplingStage(bcs.Params())
    run = Run(model, 0.99, torch.Generator().manual_seed(0), arch=arch, lr=0.1)
    stage.before_fit(run)
    budget = nonzero_count(model)
    run.optimizer = torch.optim.SGD(stage.parameters(model), lr=0.1, momentum=0.9)
    for _ in range(2):
        step(model, "at")
        stage.before_step(run)
        run.optimizer.step()
        stage.after_step(run)
        assert nonzero_count(model) == budget
    log = run.connections.steps().to_pandas()
    assert set(log.layer) == set(prunable(model))
    assert log[log.step == 2].active.sum() == budget
