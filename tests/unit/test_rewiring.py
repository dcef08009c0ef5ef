"""Rewiring: the distribution of regrown connections over layers and positions, and the budget."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robsparse.method import bcs
from robsparse.sparsity.rewiring import (
    CANDIDATES,
    ROUNDS,
    DeviceRewiring,
    HostRewiring,
    make_rewiring,
)
from robsparse.training.stages import Run

KINDS = pytest.mark.parametrize("kind", [HostRewiring, DeviceRewiring])
NEW = 1e-12


def fits(observed, expected=None):
    """Chi-square test of counts against expected counts. By default, these are all equal."""
    p_value = stats.chisquare(observed, expected).pvalue
    print(f"chi-square over {len(observed)} counts: p = {p_value:.2f}")
    assert p_value > 0.01


class Repeated:
    """Layers with given sizes and active counts. Each call of `draw` rewires them once."""

    def __init__(self, sizes, active, budget, kind=HostRewiring, *, by_room=False):
        self.sizes, self.active, self.budget = sizes, active, budget
        self.kind, self.by_room = kind, by_room
        self.generator = torch.Generator().manual_seed(4)

    def draw(self):
        """Regrown positions (bool) of each layer."""
        layers = [torch.full((size,), -1.0) for size in self.sizes]
        for layer, count in zip(layers, self.active, strict=True):
            layer[:count] = 1.0
        active = (torch.cat(layers) > 0).nonzero().squeeze(1)
        rewiring = self.kind(layers, active, self.budget, self.generator)
        survives = rewiring.move(0.0, allow_drift=False)
        drawn = rewiring.rewire(survives, NEW, by_room=self.by_room, allow_drift=False).drawn
        found = [(layer == NEW).numpy() for layer in layers]
        at = set(np.concatenate(found).nonzero()[0].tolist())
        assert set(drawn.tolist()) - {rewiring.padding} == at
        return found

    def counts(self, times):
        """How often each position of each layer was drawn."""
        total = [np.zeros(size) for size in self.sizes]
        for _ in range(times):
            for so_far, drawn in zip(total, self.draw(), strict=True):
                np.add(so_far, drawn, out=so_far)
        for so_far, active in zip(total, self.active, strict=True):
            assert not so_far[:active].any()
        return total


# ---------------------------------------------------------------- layers


@KINDS
def test_regrowths_go_to_layers_by_size_not_by_dormant_positions(kind):
    # Layers of 40 and 60 with 5 and 55 dormant: by size 0.4, by dormant positions 0.083.
    counts = [total.sum() for total in Repeated([40, 60], [35, 5], 41, kind).counts(1500)]
    assert sum(counts) == 1500
    fits(counts, [600, 900])


@KINDS
def test_regrowths_can_go_to_layers_by_dormant_positions(kind):
    # As above, but layers of 5 and 55 dormant positions get 1/12 and 11/12.
    rewiring = Repeated([40, 60], [35, 5], 41, kind, by_room=True)
    fits([total.sum() for total in rewiring.counts(1500)], [1500 / 12, 1500 * 11 / 12])


@KINDS
def test_regrowths_of_a_step_are_distributed_like_independent_draws(kind):
    # Three draws over layers of equal size: the first gets Binomial(3, 1/2).
    rewiring = Repeated([50, 50], [10, 10], 23, kind)
    observed = np.zeros(4)
    for _ in range(1200):
        observed[int(rewiring.draw()[0].sum())] += 1
    fits(observed, 1200 * stats.binom(3, 0.5).pmf(range(4)))


def test_draws_beyond_the_dormant_positions_of_a_layer_go_to_other_layers():
    # 90 % of the draws choose the large layer, which has two dormant positions.
    rewiring = Repeated([90, 10], [88, 0], budget=98)
    for _ in range(20):
        large, small = rewiring.draw()
        assert int(large.sum() + small.sum()) == 10
        assert int(large.sum()) <= 2
        assert int(small.sum()) >= 8


def test_all_layers_can_be_filled_to_the_last_position():
    drawn = bcs.draw_layers(
        9, np.array([1000, 4, 5]), np.array([0, 4, 5]), torch.Generator().manual_seed(0)
    )
    assert drawn.tolist() == [0, 4, 5]


def test_redrawn_remainder_follows_the_sizes_of_the_layers_with_room():
    generator = torch.Generator().manual_seed(0)
    sizes, room = np.array([1000, 30, 10]), np.array([0, 30, 10])
    total = sum(bcs.draw_layers(1, sizes, room, generator) for _ in range(800))
    assert total[0] == 0
    fits(total[1:], [600, 200])


@KINDS
def test_a_full_layer_is_never_drawn(kind):
    # By size 96 % of the draws would go to the first layer; the others get them 3 to 1.
    counts = [t.sum() for t in Repeated([1000, 30, 10], [1000, 0, 0], 1001, kind).counts(800)]
    assert counts[0] == 0
    fits(counts[1:], [600, 200])


# ---------------------------------------------------------------- positions


@KINDS
def test_regrown_positions_are_uniform_over_the_dormant_ones_of_a_layer(kind):
    total = Repeated([12, 20], [4, 2], 11, kind).counts(1500)
    drawn = sum(counts.sum() for counts in total)
    assert drawn == 5 * 1500 if kind is HostRewiring else drawn > 4.99 * 1500
    for counts, active in zip(total, (4, 2), strict=True):
        # A step draws several positions without replacement. This only makes the variance smaller.
        fits(counts[active:])


@KINDS
def test_positions_of_a_sparse_layer_are_found_by_random_tries_and_uniform(kind, monkeypatch):
    monkeypatch.setattr(HostRewiring, "_choose_from_lists", None)
    monkeypatch.setattr(DeviceRewiring, "_open_positions", DeviceRewiring._random_positions)
    (counts,) = Repeated([60], [6], 8, kind).counts(3000)
    assert counts.sum() == 6000
    fits(counts[6:])


@KINDS
def test_positions_of_a_nearly_full_layer_are_drawn_from_a_list_and_uniform(kind):
    # Two of 500 are dormant: 24 tries find one in 9 of 100 draws.
    assert (1 - 2 / 500) ** (CANDIDATES * ROUNDS) > 0.9
    (counts,) = Repeated([500], [498], 499, kind).counts(1500)
    assert counts.sum() == 1500
    fits(counts[498:])


@KINDS
def test_all_pairs_of_positions_have_the_same_probability(kind):
    rewiring, pairs = Repeated([7], [2], 4, kind), {}
    for _ in range(2000):
        pair = tuple(np.flatnonzero(rewiring.draw()[0]))
        pairs[pair] = pairs.get(pair, 0) + 1
    assert sum(count for pair, count in pairs.items() if len(pair) == 2) > 1980
    fits([count for pair, count in pairs.items() if len(pair) == 2])


# ---------------------------------------------------------------- many steps


def perturbed(kind, seed, steps, *, sizes=(30, 200, 60), sparsity=0.7, interrupt=None):
    """Return the values after some steps, the counts (pruned, drawn, active) of each, the budget.

    Each step makes about a tenth of the connections dormant.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1)
    layers = [torch.rand(size, generator=noise) for size in sizes]
    mask = torch.rand(sum(sizes), generator=noise) > sparsity
    for layer, part in zip(layers, mask.split(sizes), strict=True):
        layer.mul_(part)
    budget = int((1 - sparsity) * sum(sizes))
    active = mask.nonzero().squeeze(1)
    rewiring = kind(layers, active, budget, generator)
    history = []
    for step in range(steps):
        if step == interrupt:
            layers = [layer.clone() for layer in layers]
            rewiring = kind(layers, rewiring.active.clone(), budget, generator)
        for layer in layers:
            layer.sub_(torch.rand(layer.shape, generator=noise), alpha=0.3)
        before = torch.cat(layers) > 0
        survives = rewiring.move(1e-3, allow_drift=False)
        pruned, _, drawn = rewiring.rewire(survives, 0.5, by_room=False, allow_drift=False)
        now = torch.cat(layers) > 0
        assert set(rewiring.active.tolist()) - {rewiring.padding} == set(
            now.nonzero()[:, 0].tolist()
        )
        assert len(before) == rewiring.padding
        pruned, drawn = (int((found < rewiring.padding).sum()) for found in (pruned, drawn))
        history.append((pruned, drawn, int(now.sum())))
    return torch.cat(layers), history, budget


@KINDS
@given(seed=st.integers(0, 1000))
def test_the_budget_is_met_at_every_step(kind, seed):
    _, history, budget = perturbed(kind, seed, 12)
    left = [budget - active for _, _, active in history]
    assert max(active for _, _, active in history[2:]) <= max(budget, history[0][2])
    if kind is HostRewiring:
        assert all(missing <= 0 for missing in left)
    # Device rewiring makes missing draws at the next step, so they do not accumulate.
    assert sum(missing > 0 for missing in left) <= 1
    assert max(left) <= 1
    assert sum(pruned for pruned, _, _ in history) > 50


@KINDS
def test_an_interrupted_run_equals_an_uninterrupted_one(kind):
    one, two = (perturbed(kind, 3, 12, interrupt=at) for at in (None, 6))
    assert torch.equal(one[0], two[0])
    assert one[1] == two[1]


def test_device_rewiring_draws_no_more_than_its_lists_hold_and_the_rest_later():
    layers = [torch.zeros(40_000)]
    none = torch.zeros(0, dtype=torch.int64)
    rewiring = DeviceRewiring(layers, none, 3000, torch.Generator().manual_seed(0))
    found = []
    for _ in range(4):
        rewiring.rewire(
            rewiring.move(0.0, allow_drift=False), 1.0, by_room=False, allow_drift=False
        )
        found.append(int((layers[0] > 0).sum()))
    assert found == [1024, 2048, 3000, 3000]


@pytest.mark.parametrize(("active", "slots"), [(0, 5), (3, 5), (4, 5), (6, 7)])
def test_lists_of_device_rewiring_hold_the_budget_and_one_unused_slot(active, slots):
    layers = [torch.arange(8.0).flip(0) - 7.5 + active]
    rewiring = DeviceRewiring(layers, torch.arange(active), 4, torch.Generator().manual_seed(0))
    for _ in range(3):
        survives = rewiring.move(0.0, allow_drift=False)
        rewiring.rewire(survives, 1.0, by_room=False, allow_drift=False)
        assert len(rewiring.active) == slots
        assert rewiring.active[-1] == rewiring.padding == 8
    assert int((layers[0] > 0).sum()) == max(active, 4)
    again = DeviceRewiring(layers, rewiring.active, 4, torch.Generator())
    assert torch.equal(again.active, rewiring.active)  # as in an interrupted run


@KINDS
def test_values_that_are_not_finite_become_dormant_without_an_error(kind):
    layers = [torch.full((30,), math.nan), torch.ones(50)]
    active = torch.arange(40)
    rewiring = kind(layers, active, 40, torch.Generator().manual_seed(0))
    for _ in range(3):
        rewiring.rewire(
            rewiring.move(0.1, allow_drift=False), 1.0, by_room=False, allow_drift=False
        )
    assert int((torch.cat(layers) > 0).sum()) == 40


@KINDS
def test_layers_that_were_replaced_are_noticed(kind):
    layers = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    rewiring = kind(layers, torch.arange(7), 7, torch.Generator())
    assert rewiring.is_intact()
    layers[1].data = torch.zeros(3)
    assert not rewiring.is_intact()


@KINDS
def test_only_the_entries_at_the_positions_are_reset(kind):
    layers = [torch.ones(2, 2), torch.ones(3), torch.ones(2)]
    rewiring = kind(layers, torch.arange(9), 9, torch.Generator())
    velocities = [torch.arange(1.0, 5.0).view(2, 2), torch.arange(5.0, 8.0), None]
    rewiring.reset(velocities, torch.tensor([3, 4, 9, 6, 8]))
    assert [velocity.flatten().tolist() for velocity in velocities[:2]] == [[1, 2, 3, 0], [0, 6, 0]]


# ---------------------------------------------------------------- the step of BCS


def trained(device, steps, **params):
    """Prepare BCS with random gradients and make one step; return stage, run, step and steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30)).to(device)
    stage = bcs.SamplingStage(bcs.Params(**params))
    generator = torch.Generator(device).manual_seed(0)
    run = Run(model, 0.8, generator, lr=0.1)
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(stage.parameters(model), lr=0.1, momentum=0.9)
    gradients = [torch.zeros_like(theta) for theta in bcs.thetas(model)]

    def step():
        for theta, gradient in zip(bcs.thetas(model), gradients, strict=True):
            theta.grad = gradient.normal_(generator=generator) * (theta > 0)
        stage.before_step(run)
        run.optimizer.step()
        stage.after_step(run)

    step()
    return stage, run, step, steps


SWITCHES = {
    "default": {},
    "authors": {"init": "authors", "waking": "drift"},
    "reset": {"momentum": "reset", "regrowth": "dormant", "temperature": 1e-6},
    "2:4": {"pattern": "2:4"},
}


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_makes_the_cpu_wait_for_the_gpu(switches):
    stage, run, step, steps = trained("cuda", 20, **SWITCHES[switches])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counted = sum(int((theta > 0).sum()) for theta in bcs.thetas(run.model))
    assert run.connections.steps().to_pandas().groupby("step").active.sum().iloc[-1] == counted
    assert counted >= stage.rewiring.budget - 2


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_log_of_a_training_is_correct_with_both_kinds(switches, monkeypatch):
    logs = {}
    for kind in (HostRewiring, DeviceRewiring):
        with monkeypatch.context() as patch:
            patch.setattr(bcs, "make_rewiring", kind)
            _, run, step, steps = trained("cpu", 60, **SWITCHES[switches])
            for _ in range(steps):
                step()
        log = run.connections.steps().to_pandas()
        active = log[log.step == steps + 1].set_index("layer").active
        for name, theta in zip(active.index, bcs.thetas(run.model), strict=True):
            assert active[name] == int((theta > 0).sum())
        lifetimes = run.connections.lifetimes().to_pandas()
        assert lifetimes.pruned.sum() + lifetimes.active.sum() == log.regrown.sum()
        logs[kind] = log
    one, two = (log.groupby("step")[["pruned", "regrown"]].sum().sum() for log in logs.values())
    print(f"pruned and regrown: on the host {one.tolist()}, on the device {two.tolist()}")
    # The numbers of two runs differ with a standard deviation of 7 %.
    assert two.pruned == pytest.approx(one.pruned, rel=0.2)
    assert two.regrown == pytest.approx(one.regrown, rel=0.2)


@pytest.mark.parametrize(("device", "kind"), [("cpu", HostRewiring), ("meta", DeviceRewiring)])
def test_device_of_the_layers_decides_the_kind(device, kind, monkeypatch):
    monkeypatch.setattr(kind, "__init__", lambda self, *_: None)
    generator = torch.Generator()
    layers = [torch.zeros(4, device=device)]
    assert type(make_rewiring(layers, torch.arange(2), 2, generator)) is kind
