"""The projection, the penalty and the updates of ADMM, by hand."""

import pytest
import torch
from torch import nn

from robsparse.baselines import admm
from robsparse.training.stages import Run


def start(weight, sparsity=0.5, **params):
    model = nn.Sequential(nn.Linear(len(weight), 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([weight]))
    stage = admm.AdmmStage(admm.Params(update_every=1, rho=0.5, rho_growth=2.0, **params))
    run = Run(model=model, sparsity=sparsity, generator=torch.Generator())
    stage.before_fit(run)
    return stage, run, model[0].weight


def test_projection_keeps_the_k_largest_magnitudes():
    weight = torch.tensor([[1.0, -4.0], [3.0, 2.0]])
    kept = admm.survivors(weight, 0.5, admm.Params())
    assert (weight * kept).tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_three_updates_of_w_z_u_and_rho():
    stage, run, weight = start([4.0, 1.0])
    assert stage.Z["0"].tolist() == [[4.0, 0.0]]
    assert stage.U["0"].tolist() == [[0.0, 0.0]]
    # (W, then Z = project(W + U), U = U + W - Z, rho)
    expected = [
        ([3.0, 2.0], [3.0, 0.0], [0.0, 2.0], 1.0),
        ([2.0, 1.0], [0.0, 3.0], [2.0, 0.0], 2.0),  # W + U = (2, 3)
        ([1.0, 2.0], [3.0, 0.0], [0.0, 2.0], 4.0),  # W + U = (3, 2)
    ]
    for epoch, (w, z, u, rho) in enumerate(expected, start=1):
        weight.data.copy_(torch.tensor([w]))
        run.epoch = epoch
        stage.before_epoch(run)
        assert stage.Z["0"].tolist() == [z]
        assert stage.U["0"].tolist() == [u]
        assert stage.rho == rho


def test_nothing_is_updated_at_epoch_0_and_between_periods():
    stage, run, _ = start([4.0, 1.0])
    stage.params = stage.params.model_copy(update={"update_every": 3})
    for run.epoch in (0, 1, 2):
        stage.before_epoch(run)
        assert stage.rho == 0.5
    run.epoch = 3
    stage.before_epoch(run)
    assert stage.rho == 1.0


def test_penalty_is_half_rho_times_the_squared_gap_and_its_gradient_points_to_z_minus_u():
    stage, run, weight = start([4.0, 1.0])
    stage.U["0"] = torch.tensor([[0.5, 0.5]])
    weight.data.copy_(torch.tensor([[3.0, 1.0]]))
    value = stage.penalty(run)
    # W - Z + U = (3 - 4 + 0.5, 1 - 0 + 0.5)
    assert value.item() == pytest.approx(0.5 * 0.5 * (0.25 + 2.25))
    value.backward()
    assert weight.grad.tolist() == [[0.5 * -0.5, 0.5 * 1.5]]


@pytest.mark.parametrize("dual_gradient", ["textbook", "authors"])
def test_gradient_of_the_penalty_after_updates(dual_gradient):
    """The slow side stores the graph of U, as in the authors' code, or U is a constant."""
    stage, run, weight = start([4.0, 1.0, -2.0, 0.5], dual_gradient=dual_gradient)
    built = torch.zeros(1, 4)
    for epoch, values in enumerate([[3.0, 2.0, -1.0, 0.25], [2.0, 1.0, -3.0, 1.0]], start=1):
        weight.data.copy_(torch.tensor([values]))
        run.epoch = epoch
        stage.before_epoch(run)
        # The graph contains W with its value at the update.
        built = built + weight - weight.detach() + torch.tensor([values]) - stage.Z["0"]
        assert torch.equal(built.detach(), stage.U["0"])
    weight.data.copy_(torch.tensor([[1.0, -1.0, 0.5, 2.0]]))
    value = stage.penalty(run)
    dual = built if dual_gradient == "authors" else stage.U["0"]
    gap = weight.detach() - stage.Z["0"] + stage.U["0"]
    assert value.item() == pytest.approx(0.5 * stage.rho * gap.square().sum().item())
    [gradient] = torch.autograd.grad(value, weight)
    times = torch.autograd.grad((weight + dual).sum(), weight)[0]  # how often the gap contains W
    expected = stage.rho * gap * times
    assert torch.allclose(gradient, expected)
    assert times.tolist() == [[3.0 if dual_gradient == "authors" else 1.0] * 4]


def test_learning_rate_restarts_each_period_and_drops_each_third():
    stage, *_ = start([4.0, 1.0])
    stage.params = stage.params.model_copy(update={"update_every": 3})
    factors = [stage.lr_factor(step, 2) for step in range(8)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 1, 1])


def test_state_is_restored():
    stage, run, weight = start([4.0, 1.0])
    weight.data.copy_(torch.tensor([[1.0, 3.0]]))
    run.epoch = 1
    stage.before_epoch(run)
    other, *_ = start([4.0, 1.0])
    other.load_state(stage.state())
    assert (other.rho, other.updates) == (stage.rho, stage.updates) == (1.0, 1)
    assert torch.equal(other.Z["0"], stage.Z["0"])
    assert torch.equal(other.U["0"], stage.U["0"])
