"""N:M patterns against loops over single weights, and masks and rewiring with a pattern."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from torch import nn
from torch.sparse import _semi_structured_conversions as tensor_cores

from robsparse.base.counts import keep_count, layer_keep_count
from robsparse.baselines import hydra, lwm
from robsparse.method import bcs
from robsparse.schema.fields import least_sparsity
from robsparse.sparsity.budgets import capacities, erk_keep_counts
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.sparsity.masks import magnitude_masks, random_masks, top_k_mask
from robsparse.sparsity.patterns import Groups, capacity, largest_of_groups, open_positions
from robsparse.sparsity.rewiring import DeviceRewiring, HostRewiring
from robsparse.training.stages import Run, begin_stage, end_stage

KINDS = pytest.mark.parametrize("kind", [HostRewiring, DeviceRewiring])
PATTERNS = st.sampled_from(["1:2", "2:4", "1:4", "3:5", "1:16", "7:8"])
SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(1, 18)),
    st.tuples(st.integers(1, 3), st.integers(1, 18), st.integers(1, 3), st.integers(1, 2)),
)


def slow_groups(shape, pattern):
    """The flat positions of every group: M input channels of one output channel and one tap."""
    size = int(pattern.split(":")[1])
    for out in range(shape[0]):
        for tap in itertools.product(*map(range, shape[2:])):
            for first in range(0, shape[1], size):
                channels = range(first, min(first + size, shape[1]))
                yield [int(np.ravel_multi_index((out, c, *tap), shape)) for c in channels]


def slow_top_k(score, k, pattern):
    """Keep the largest entries one by one, the first of equal ones, if their group has room."""
    room = [int(pattern.split(":")[0])] * sum(1 for _ in slow_groups(score.shape, pattern))
    group_of = {p: i for i, own in enumerate(slow_groups(score.shape, pattern)) for p in own}
    flat, kept = score.flatten().tolist(), []
    for place in sorted(range(len(flat)), key=lambda p: (-flat[p], p)):
        if len(kept) < k and room[group_of[place]]:
            room[group_of[place]] -= 1
            kept.append(place)
    return sorted(kept)


def most_in_a_group(mask, pattern):
    flat = mask.flatten().tolist()
    return max(sum(flat[p] for p in group) for group in slow_groups(mask.shape, pattern))


def scores(shape, seed):
    """Whole numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


def network():
    """A first layer of 3 channels, layers with a rest of 2 and none, a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.ReLU(),
        nn.Conv2d(10, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def images(seed):
    return torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def weights(model):
    return {name: module.weight.detach() for name, module in prunable(model).items()}


# ---------------------------------------------------------------- groups


def test_groups_of_a_convolution_by_hand():
    # One output channel, six input channels, two taps. In memory: c0t0 c0t1 c1t0 c1t1 ...
    groups = list(slow_groups((1, 6, 1, 2), "2:4"))
    assert groups == [[0, 2, 4, 6], [8, 10], [1, 3, 5, 7], [9, 11]]
    one_layer = Groups([torch.zeros(1, 6, 1, 2)], "2:4")
    assert one_layer.members(torch.tensor([6, 8, 11])).tolist() == [
        [0, 2, 4, 6],
        [8, 10, 12, 12],
        [9, 11, 12, 12],
    ]


@pytest.mark.parametrize("layer", [nn.Conv2d(64, 64, 3), nn.Linear(128, 64)])
def test_masked_weights_survive_the_format_of_sparse_tensor_cores(layer):
    """The format stores two of four weights of the reduction with channels-last images.

    Masks with groups in the memory order of PyTorch lose weights in it, so the test can fail.
    """

    def restored(mask):
        weight = (layer.weight * mask).detach().half()
        if weight.ndim == 4:
            weight = weight.permute(0, 2, 3, 1)  # taps outside, input channels inside
        matrix = weight.reshape(len(weight), -1).contiguous()
        stored = tensor_cores.sparse_semi_structured_from_dense_cutlass(matrix)
        return torch.equal(tensor_cores.sparse_semi_structured_to_dense_cutlass(*stored), matrix)

    assert restored(top_k_mask(layer.weight.abs(), layer.weight.numel() // 2, "2:4"))
    assert restored(top_k_mask(layer.weight.abs(), layer.weight.numel() // 10, "2:4"))
    if layer.weight.ndim == 4:
        flat = layer.weight.detach().reshape(64, -1)
        assert not restored(largest_of_groups(flat, "2:4").view_as(layer.weight))


@given(SHAPES, PATTERNS, st.integers(0, 1000))
def test_masks_equal_the_slow_ones(shape, pattern, seed):
    score = scores(shape, seed)
    most = capacity(score.shape, pattern)
    n = int(pattern.split(":")[0])
    assert most == sum(min(n, len(group)) for group in slow_groups(shape, pattern))
    assert capacity(score.shape, None) == score.numel()
    full = largest_of_groups(score, pattern)
    assert full.flatten().nonzero().flatten().tolist() == slow_top_k(score, most, pattern)
    for k in {0, 1, most // 2, most}:
        mask = top_k_mask(score, k, pattern)
        assert mask.shape == score.shape
        assert mask.flatten().nonzero().flatten().tolist() == slow_top_k(score, k, pattern)


@given(st.integers(0, 1000), st.integers(1, 5))
def test_no_mask_of_the_pattern_has_a_larger_sum(seed, k):
    score = scores((1, 8), seed)
    sums = [
        sum(score[0, p].item() for p in chosen)
        for chosen in itertools.combinations(range(8), min(k, 4))
        if most_in_a_group(torch.isin(torch.arange(8), torch.tensor(chosen))[None], "2:4") <= 2
    ]
    assert score[top_k_mask(score, min(k, 4), "2:4")].sum() == max(sums)


@given(SHAPES, PATTERNS, st.integers(0, 1000), st.floats(0, 1))
def test_open_positions_equal_the_slow_ones(shape, pattern, seed, share):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    flat, n = mask.flatten().tolist(), int(pattern.split(":")[0])
    expected = {
        place
        for group in slow_groups(shape, pattern)
        for place in group
        if not flat[place] and sum(flat[p] for p in group) < n
    }
    assert set(open_positions(mask, pattern).flatten().nonzero().flatten().tolist()) == expected
    assert torch.equal(open_positions(mask, None), ~mask)


@given(st.lists(SHAPES, min_size=1, max_size=3), PATTERNS, st.integers(0, 1000))
def test_room_of_single_positions_equals_the_slow_one(shapes, pattern, seed):
    """Several layers: room at every position, and which positions of a list fit together."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(shape, generator=generator) - 0.7 for shape in shapes]
    values = torch.cat([*(layer.flatten() for layer in layers), torch.ones(1)])
    groups, start, n = [], 0, int(pattern.split(":")[0])
    for layer in layers:
        groups += [[start + p for p in own] for own in slow_groups(layer.shape, pattern)]
        start += layer.numel()
    group_of = {place: group for group in groups for place in group}
    made, every = Groups(layers, pattern), torch.arange(start + 1)
    room = [n - sum(values[p].item() > 0 for p in group_of[place]) for place in range(start)]
    assert made.room(values, every)[:-1].tolist() == room
    dormant = every[(values <= 0) & (every < start)]
    listed = torch.cat([dormant, every[-1:]])
    listed = listed[torch.randperm(len(listed), generator=generator)]
    expected = []
    for place in listed.tolist():
        beside = sum(p in expected for p in group_of.get(place, []))
        expected.append(place if place < start and beside < room[place] else start)
    assert made.fitting(values, listed).tolist() == expected
    assert made.fitting(values, listed[:0]).tolist() == []


# ---------------------------------------------------------------- masks of a network


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("2:4", 0.9), ("1:16", 0.9375)])
def test_masks_of_a_network_have_the_pattern_and_the_counts_of_the_sparsity(pattern, sparsity):
    model = network()
    masks = magnitude_masks(model, sparsity, pattern)
    for name, weight in weights(model).items():
        k = layer_keep_count(weight.numel(), sparsity)
        assert masks[name].flatten().nonzero().flatten().tolist() == slow_top_k(
            weight.abs(), k, pattern
        )
    free = magnitude_masks(model, sparsity)
    assert any(
        most_in_a_group(mask, pattern) > int(pattern.split(":")[0]) for mask in free.values()
    )


def test_at_half_sparsity_every_whole_group_has_two_of_four():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.Linear(12, 5))
    for mask in magnitude_masks(model, 0.5, "2:4").values():
        flat = mask.flatten().tolist()
        assert {sum(flat[p] for p in own) for own in slow_groups(mask.shape, "2:4")} == {2}


@given(PATTERNS, st.integers(0, 99), st.integers(0, 1000))
def test_random_masks_and_counts_have_the_pattern_at_every_sparsity(pattern, above, seed):
    model, least = network(), float(least_sparsity(pattern))
    sparsity = round(least + (0.99 - least) * above / 99 + 5e-5, 4)
    budget, caps = keep_count(weight_count(model), sparsity), capacities(model, pattern)
    for name, weight in weights(model).items():
        assert layer_keep_count(weight.numel(), sparsity) <= caps[name]
    for init in ("strict", "erk", "uniform"):
        run = Run(model=model, sparsity=sparsity, generator=torch.Generator().manual_seed(seed))
        counts = bcs.initial_counts(run, init, pattern)
        assert sum(counts.values()) == budget
        assert all(counts[name] <= caps[name] for name in caps)
        masks = random_masks(model, counts, run.generator, pattern)
        for name, mask in masks.items():
            assert int(mask.sum()) == counts[name]
            assert most_in_a_group(mask, pattern) <= int(pattern.split(":")[0])


def test_shares_of_layers_below_the_pattern_are_those_without_it():
    model = network()
    assert erk_keep_counts(model, 0.95, "2:4") == erk_keep_counts(model, 0.95)
    free, limited = erk_keep_counts(model, 0.5), erk_keep_counts(model, 0.5, "2:4")
    assert free["5"] > limited["5"] == capacities(model, "2:4")["5"] == 160
    assert sum(free.values()) == sum(limited.values())


def test_random_positions_are_drawn_one_after_the_other():
    """In groups of 3 and 2, the first draw is uniform, and the second is in the other group."""
    counts = np.zeros(2)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1, bias=False))  # groups of 3 and of 2
    for _ in range(1000):
        mask = random_masks(model, {"0": 1}, generator, "1:3")["0"][0]
        counts += [int(mask[:3].sum()), int(mask[3:].sum())]
        both = random_masks(model, {"0": 2}, generator, "1:3")["0"][0]
        assert int(both[:3].sum()) == int(both[3:].sum()) == 1
    assert stats.chisquare(counts, [600, 400]).pvalue > 0.01


# ---------------------------------------------------------------- methods


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_hydra_keeps_the_largest_scores_of_each_group_at_every_step(sparsity):
    model = network()
    prune, finetune = hydra.stages(hydra.Params(pattern="2:4"))
    run = Run(model=model, sparsity=sparsity, generator=torch.Generator())
    begin_stage(run, prune, 4)
    for step in range(4):
        run.optimizer.zero_grad()
        (model(images(step)).square().sum() * 10).backward()
        run.optimizer.step()
        for module in prunable(model).values():
            score = module.parametrizations.weight[0].score.detach()
            k = layer_keep_count(score.numel(), sparsity)
            kept = (module.weight != 0).flatten().nonzero().flatten().tolist()
            assert kept == slow_top_k(score.abs(), k, "2:4")
    end_stage(run, prune)
    chosen = {name: weight != 0 for name, weight in weights(model).items()}
    begin_stage(run, finetune, 1)
    assert all(torch.equal(chosen[name], w != 0) for name, w in weights(model).items())


def test_a_kept_weight_of_zero_does_not_let_another_weight_into_the_group():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0, 3.0, 0.0]]))
    (stage,) = lwm.stages(lwm.Params(pattern="2:4"))
    stage.before_fit(Run(model=model, sparsity=0.5, generator=torch.Generator()))
    assert model[0].parametrizations.weight[0].mask.tolist() == [[True, False, True, False]]


def sampled(kind, params, sparsity, monkeypatch, *, steps=25):
    """Run BCS with large noise. Yields the network, the budget and the stage after each step."""
    monkeypatch.setattr(bcs, "make_rewiring", kind)
    model = network()
    (stage,) = bcs.stages(bcs.Params(noise_scale=0.3, **params))
    run = Run(model=model, sparsity=sparsity, generator=torch.Generator().manual_seed(1))
    begin_stage(run, stage, steps)
    for step in range(steps):
        run.step = step
        run.optimizer.zero_grad()
        (model(images(step)).square().mean() * 10).backward()
        stage.before_step(run)
        run.optimizer.step()
        stage.after_step(run)
        yield run, stage


@KINDS
@pytest.mark.parametrize("init", ["strict", "erk", "uniform"])
@pytest.mark.parametrize("regrowth", ["size", "dormant"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.9), ("2:4", 0.95)])
def test_bcs_has_the_pattern_at_every_step(  # noqa: PLR0917
    kind, init, regrowth, pattern, sparsity, monkeypatch
):
    params = {"init": init, "regrowth": regrowth, "pattern": pattern}
    drawn, n = 0, int(pattern.split(":")[0])
    for run, stage in sampled(kind, params, sparsity, monkeypatch):
        budget = keep_count(weight_count(run.model), sparsity)
        # Device rewiring makes a draw that found no open position at the next step.
        missing = budget - nonzero_count(run.model)
        assert missing == 0 if kind is HostRewiring else 0 <= missing <= 0.05 * budget
        assert all(most_in_a_group(w != 0, pattern) <= n for w in weights(run.model).values())
        active = set(stage.rewiring.active.tolist()) - {stage.rewiring.padding}
        assert len(active) == nonzero_count(run.model)
        drawn += int((stage.rewiring.values[:-1] == stage.params.regrown_theta).sum())
    assert drawn > 20


@KINDS
def test_without_the_pattern_groups_get_too_many(kind, monkeypatch):
    for run, _ in sampled(kind, {}, 0.5, monkeypatch, steps=3):
        assert max(most_in_a_group(w != 0, "2:4") for w in weights(run.model).values()) > 2


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"init": "authors"}, "pattern: expected an init that meets the budget exactly"),
        ({"waking": "drift"}, "pattern: expected waking 'drawn', because drift ignores the groups"),
    ],
)
def test_bcs_refuses_settings_that_ignore_the_pattern(params, message):
    bcs.Params(**params)
    with pytest.raises(ValidationError, match=message):
        bcs.Params(**params, pattern="2:4")


# ---------------------------------------------------------------- draws


def draw(kind, generator, *, shape, active, count, pattern):
    """Positions that are drawn in a layer whose positions `active` are active."""
    layer = torch.full(shape, -1.0)
    layer.view(-1)[list(active)] = 1.0
    active = torch.tensor(sorted(active))
    rewiring = kind([layer], active, len(active) + count, generator, pattern)
    survives = rewiring.move(0.0, allow_drift=False)
    drawn = rewiring.rewire(survives, 1e-12, by_room=False, allow_drift=False).drawn
    return tuple(sorted(p for p in drawn.tolist() if p < layer.numel()))


def slow_probabilities(*, shape, active, count, pattern, chosen=()):
    """Probability of each set: each draw is uniform over the positions that are then open."""
    if count == 0:
        return {tuple(sorted(chosen)): 1.0}
    mask = torch.zeros(int(np.prod(shape)), dtype=torch.bool)
    mask[[*active, *chosen]] = True
    n = int(pattern.split(":")[0])
    free = [
        p
        for group in slow_groups(shape, pattern)
        if sum(mask[q].item() for q in group) < n
        for p in group
        if not mask[p]
    ]
    found = {}
    for place in free:
        rest = slow_probabilities(
            shape=shape,
            active=active,
            count=count - 1,
            pattern=pattern,
            chosen=(*chosen, place),
        )
        for own, share in rest.items():
            found[own] = found.get(own, 0.0) + share / len(free)
    return found


@KINDS
def test_sets_of_drawn_positions_have_the_probabilities_of_single_draws(kind):
    # Seven positions in groups of 3, 3 and 1; the first group has room for one more.
    case = {"shape": (1, 7), "active": (0,), "count": 2, "pattern": "2:3"}
    expected, generator = slow_probabilities(**case), torch.Generator().manual_seed(0)
    assert len(set(expected.values())) > 1  # the sets are not equally probable
    observed, times = dict.fromkeys(expected, 0), 1500
    for _ in range(times):
        drawn = draw(kind, generator, **case)
        if len(drawn) == 2:  # otherwise, device rewiring makes one draw later
            observed[drawn] += 1
    total = sum(observed.values())
    assert total == times if kind is HostRewiring else total > 0.99 * times
    counts = [total * p for p in expected.values()]
    p_value = stats.chisquare(list(observed.values()), counts).pvalue
    print(f"{kind.__name__}: {len(expected)} sets, p = {p_value:.2f}")
    assert p_value > 0.01


@KINDS
def test_open_positions_of_a_nearly_full_layer_are_drawn_from_a_list_and_uniform(kind):
    # 100 groups with 2 of 4, but two groups with room for one: 6 of 400 positions are open.
    active = [p for p in range(400) if p % 4 < 2 and p not in {0, 201}]
    case = {"shape": (1, 400), "active": active, "count": 1, "pattern": "2:4"}
    counts, generator = np.zeros(400), torch.Generator().manual_seed(0)
    for _ in range(600):
        counts[list(draw(kind, generator, **case))] += 1
    possible = [0, 2, 3, 201, 202, 203]
    assert counts.sum() == counts[possible].sum() == 600
    assert stats.chisquare(counts[possible]).pvalue > 0.01


def test_the_last_open_positions_of_all_layers_are_found():
    """Every group of every layer can be filled, although the large layer is drawn most often."""
    shapes, generator = [(40, 8), (1, 5), (2, 3, 2, 2)], torch.Generator().manual_seed(0)
    layers = [torch.zeros(shape) for shape in shapes]
    budget = sum(capacity(layer.shape, "2:4") for layer in layers)
    none = torch.zeros(0, dtype=torch.int64)
    rewiring = HostRewiring(layers, none, budget, generator, "2:4")
    rewiring.rewire(rewiring.move(0.0, allow_drift=False), 1.0, by_room=False, allow_drift=False)
    assert sum(int((layer > 0).sum()) for layer in layers) == budget
    assert all(most_in_a_group(layer > 0, "2:4") == 2 for layer in layers)
