"""BCS: steps by hand, a slow independent implementation, and invariants."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robsparse.base.counts import density, keep_count
from robsparse.method import bcs
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.sparsity.masks import plain_state
from robsparse.sparsity.rewiring import Rewiring
from robsparse.training.stages import Run


def network(sizes=(6, 8, 5), seed=0):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def started(model, sparsity, *, seed=0, lr=0.1, sgd_momentum=0.9, **params):
    """Return a stage and a run before the first step."""
    stage = bcs.SamplingStage(bcs.Params(**params))
    run = Run(model=model, sparsity=sparsity, generator=torch.Generator().manual_seed(seed), lr=lr)
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=sgd_momentum)
    return stage, run


def last_step(run):
    """Return the numbers of pruned and regrown connections of the last step."""
    log = run.connections.steps().to_pandas()
    return log[log.step == log.step.max()][["pruned", "regrown"]].sum().to_dict()


def step(stage, run, gradients):
    """One update with the given gradient of every theta."""
    for theta, gradient in zip(bcs.thetas(run.model), gradients, strict=True):
        theta.grad = gradient * (theta > 0)
    stage.before_step(run)
    run.optimizer.step()
    stage.after_step(run)


def random_gradients(run, generator, scale=1.0):
    return [scale * torch.randn(t.shape, generator=generator) for t in bcs.thetas(run.model)]


def test_weight_is_sign_times_theta_where_theta_is_positive():
    layer = bcs.SignedTheta(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    weight = layer(torch.tensor([0.5, 0.25, -0.5, 0.0]))
    assert weight.tolist() == [0.5, -0.25, 0.0, 0.0]


def test_gradient_of_an_active_theta_is_the_gradient_of_the_weight_times_sign():
    layer = bcs.SignedTheta(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    theta = torch.tensor([0.5, 0.25, -0.5, 0.0], requires_grad=True)
    layer(theta).backward(torch.tensor([2.0, 3.0, 5.0, 7.0]))
    assert theta.grad.tolist() == [2.0, -3.0, 0.0, 0.0]


def test_one_step_by_hand():
    """Two of four weights are active. One becomes dormant, and one of three dormant is regrown."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    stage, run = started(model, 0.5, sgd_momentum=0.0, noise_scale=0.0)
    (theta,) = bcs.thetas(model)
    theta.data.copy_(torch.tensor([[0.3, 0.05, 0.0, -0.2]]))
    step(stage, run, [torch.tensor([[1.0, 1.0, 1.0, 1.0]])])
    after = theta.detach()[0]
    assert after[0] == pytest.approx(0.2)  # 0.3 - 0.1 * 1
    regrown = [i for i in range(4) if after[i] == torch.tensor(1e-12)]
    assert len(regrown) == 1
    assert regrown[0] in (1, 2, 3)
    if regrown[0] != 1:
        assert after[1] == pytest.approx(-0.05)
    assert last_step(run) == {"pruned": 1, "regrown": 1}
    assert nonzero_count(model) == 2


def slow_step(thetas, signs, velocities, weight_gradients, *, lr, momentum, shrink):
    """SGDW on theta in NumPy, in the published order of a step, without noise."""
    masks = [theta > 0 for theta in thetas]
    for theta, sign, velocity, gradient, active in zip(
        thetas, signs, velocities, weight_gradients, masks, strict=True
    ):
        g = np.where(active, sign * gradient, 0.0)
        theta[:] = (1 - shrink) * theta
        velocity[:] = momentum * velocity - lr * g
        theta[:] = theta + velocity
        # waking: drawn, so no dormant theta becomes active without a draw
        theta[~active] = np.minimum(theta[~active], 0.0)


def test_fifty_steps_equal_a_slow_implementation_given_the_same_regrowths():
    """Weight gradients are random. Regrown positions are copied. All other values must agree."""
    model = network().double()
    stage, run = started(model, 0.7, noise_scale=0.0)
    signs = [m.parametrizations.weight[0].sign.double().numpy() for m in prunable(model).values()]
    slow = [theta.detach().numpy().copy() for theta in bcs.thetas(model)]
    velocities = [np.zeros_like(theta) for theta in slow]
    budget = keep_count(weight_count(model), 0.7)
    rng = np.random.default_rng(0)
    total_regrown = 0
    for _ in range(50):
        gradients = [rng.normal(size=theta.shape) for theta in slow]
        slow_step(slow, signs, velocities, gradients, lr=0.1, momentum=0.9, shrink=5e-4)
        deficit = budget - sum(int((theta > 0).sum()) for theta in slow)
        with torch.no_grad():
            for theta in bcs.thetas(model):
                theta.grad = None
        for theta, sign, gradient in zip(bcs.thetas(model), signs, gradients, strict=True):
            theta.grad = torch.tensor(sign * gradient) * (theta > 0)
        stage.before_step(run)
        with torch.no_grad():
            for theta in bcs.thetas(model):
                theta.mul_(1 - 5e-4)
        run.optimizer.step()
        stage.after_step(run)
        assert last_step(run)["regrown"] == deficit
        total_regrown += deficit
        for mine, theirs in zip(slow, bcs.thetas(model), strict=True):
            fresh = (mine <= 0) & (theirs.detach().numpy() > 0)
            assert np.all(theirs.detach().numpy()[fresh] == 1e-12)
            mine[fresh] = 1e-12
            np.testing.assert_allclose(theirs.detach().numpy(), mine, rtol=0, atol=1e-12)
    assert total_regrown > 50


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=3, max_size=4),
    sparsity=st.sampled_from([0.3, 0.5, 0.9, 0.95]),
    seed=st.integers(0, 1000),
    momentum=st.sampled_from(["keep", "reset"]),
)
def test_active_count_is_the_budget_at_every_step(sizes, sparsity, seed, momentum):
    model = network(tuple(sizes), seed)
    budget = keep_count(weight_count(model), sparsity)
    # The noise is a million times the published one. It must not make dormant weights active.
    stage, run = started(model, sparsity, seed=seed, noise_scale=1.0, momentum=momentum)
    signs = [m.parametrizations.weight[0].sign.clone() for m in prunable(model).values()]
    assert nonzero_count(model) == budget
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        step(stage, run, random_gradients(run, generator))
        assert nonzero_count(model) == budget
        state = plain_state(model)
        for (name, module), sign in zip(prunable(model).items(), signs, strict=True):
            theta = module.parametrizations.weight.original
            assert torch.equal(module.parametrizations.weight[0].sign, sign)
            assert torch.all(state[f"{name}.weight"][theta <= 0] == 0)
            assert torch.all(torch.sign(state[f"{name}.weight"][theta > 0]) == sign[theta > 0])


def test_between_update_and_rewiring_the_count_is_at_most_the_budget(monkeypatch):
    model = network((10, 12, 6))
    stage, run = started(model, 0.6, noise_scale=1.0)
    budget, generator = keep_count(weight_count(model), 0.6), torch.Generator().manual_seed(1)
    counts = []
    rewire = Rewiring.rewire

    def counted(*args, **options):
        counts.append(nonzero_count(model))
        return rewire(*args, **options)

    monkeypatch.setattr(Rewiring, "rewire", counted)
    for _ in range(20):
        step(stage, run, random_gradients(run, generator))
    assert max(counts) <= budget
    assert min(counts) < budget


def test_noise_changes_only_active_weights_and_scales_with_the_learning_rate():
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    stage, run = started(model, 0.5, lr=0.2, sgd_momentum=0.0, noise_scale=0.1)
    (theta,) = bcs.thetas(model)
    theta.data = torch.where(theta > 0, 1.0, -1.0)
    before = theta.detach().clone()
    step(stage, run, [torch.zeros(100, 100)])
    moved = (theta.detach() - before)[before > 0]
    assert torch.equal(theta.detach()[before < 0], before[before < 0])
    assert float(moved.std()) == pytest.approx(0.2 * 0.1, rel=0.05)


def test_velocity_of_a_regrown_weight_is_kept_or_reset():
    for momentum, expected in (("keep", False), ("reset", True)):
        model = nn.Sequential(nn.Linear(4, 1, bias=False))
        stage, run = started(model, 0.5, momentum=momentum, noise_scale=0.0)
        (theta,) = bcs.thetas(model)
        theta.data.copy_(torch.tensor([[0.3, 0.05, 0.0, 0.0]]))
        # Both active weights are pruned. Two of four positions are regrown; some have a velocity.
        velocities = []
        for _ in range(6):
            step(stage, run, [torch.full((1, 4), 10.0)])
            velocity = run.optimizer.state[theta]["momentum_buffer"]
            velocities.append(bool((velocity[theta == 1e-12] == 0).all()))
        assert all(velocities) is expected


def test_layers_are_drawn_with_probability_proportional_to_size():
    sizes, room = np.array([1000, 3000, 6000]), np.array([900, 2900, 5900])
    drawn = bcs.draw_layers(2000, sizes, room, torch.Generator().manual_seed(0))
    p_value = stats.chisquare(drawn, 2000 * sizes / 10000).pvalue
    assert p_value > 0.01


def test_positions_are_drawn_uniformly_among_the_dormant():
    counts = np.zeros(40)
    model = nn.Sequential(nn.Linear(40, 1, bias=False))
    stage, run = started(model, 0.9, noise_scale=0.0)
    (theta,) = bcs.thetas(model)
    for _ in range(2000):
        # Three are active and the budget is four, so one is regrown.
        theta.data = torch.tensor([[1.0, 1.0, 1.0, *[0.0] * 37]])
        stage.before_step(run)
        stage.after_step(run)
        counts += (theta.detach()[0] == 1e-12).numpy()
    assert counts[:3].sum() == 0
    assert counts.sum() == 2000
    assert stats.chisquare(counts[3:]).pvalue > 0.01


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    room=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    data=st.data(),
)
def test_no_layer_gets_more_than_its_dormant_positions(room, data):
    count = data.draw(st.integers(0, sum(room)))
    sizes = np.array([r + 5 for r in room])
    drawn = bcs.draw_layers(count, sizes, np.array(room), torch.Generator().manual_seed(0))
    assert int(drawn.sum()) == count
    assert np.all(drawn <= room)


def test_authors_init_has_their_shares_and_may_exceed_the_budget():
    model = network((10, 20, 30, 10))
    counts = bcs.initial_counts(Run(model, 0.99, torch.Generator()), "authors")
    assert list(counts.values()) == [120, int(0.5 * 0.01 * 600), 180]
    stage, run = started(model, 0.99, init="authors", noise_scale=0.0)
    found = nonzero_count(model)
    assert found == sum(counts.values()) > keep_count(weight_count(model), 0.99)
    step(stage, run, [torch.zeros_like(t) for t in bcs.thetas(model)])
    assert nonzero_count(model) == found  # only regrown, never pruned


def test_authors_init_below_the_budget_is_filled_by_the_first_rewiring():
    model = network((10, 200, 200, 10))
    stage, run = started(model, 0.5, init="authors", noise_scale=0.0)
    budget = keep_count(weight_count(model), 0.5)
    assert nonzero_count(model) < budget
    step(stage, run, [torch.zeros_like(t) for t in bcs.thetas(model)])
    assert nonzero_count(model) == budget


def test_theta_starts_at_the_magnitude_of_the_initial_weights():
    model = network()
    before = {name: m.weight.detach().clone() for name, m in prunable(model).items()}
    started(model, 0.5)
    for name, module in prunable(model).items():
        now = module.weight.detach()
        assert torch.equal(now[now != 0], before[name][now != 0])


def test_density_is_exact():
    assert density(0.9) == 0.1
    assert density(0.995) == 0.005
