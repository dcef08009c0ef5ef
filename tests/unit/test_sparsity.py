"""Masks, layer shares and plain networks with exact zeros."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from robsparse.base.counts import keep_count, layer_keep_count
from robsparse.base.errors import TrainingError
from robsparse.sparsity.budgets import erk_keep_counts, layer_keep_counts, quota_keep_counts
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.sparsity.masks import (
    Masked,
    apply_masks,
    bake,
    effective_weights,
    global_masks,
    magnitude_masks,
    plain_state,
    random_masks,
    top_k_mask,
)

SPARSITIES = st.integers(0, 9990).map(lambda n: n / 10_000)


def linear_net(*widths):
    return nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(widths)))


def conv_net(channels=2):
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * channels, 3),
    )


@st.composite
def nets(draw):
    """A chain of convolutions and linear layers, that is never run. Only its shapes are used."""
    layers = []
    for _ in range(draw(st.integers(1, 5))):
        i, o = draw(st.integers(1, 40)), draw(st.integers(1, 40))
        kernel = draw(st.sampled_from([0, 1, 3, 5]))
        layers.append(nn.Conv2d(i, o, kernel) if kernel else nn.Linear(i, o))
    return nn.Sequential(*layers)


# ---------------------------------------------------------------- what counts


def test_only_convolution_and_linear_weights_are_prunable():
    model = conv_net()
    assert list(prunable(model)) == ["0", "4"]
    assert weight_count(model) == 2 * 9 + 32 * 3


def test_nonzero_count_counts_the_weights_of_the_forward_pass():
    model = linear_net(3, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0, -2.0], [0.0, -0.0, 3.0]]))
    assert nonzero_count(model) == 3
    apply_masks(model, {"0": torch.tensor([[True, True, False], [True, True, True]])})
    assert nonzero_count(model) == 2
    assert weight_count(model) == 6


# ---------------------------------------------------------------- layer shares


def test_layer_keep_counts_are_the_same_share_rounded_up():
    assert layer_keep_counts(linear_net(5, 3, 4), 0.9) == {"0": 2, "1": 2}


def test_erk_by_hand_without_a_full_layer():
    # sizes 200 and 400, budget 60; shares in proportion to 30 and 40
    # 60 * 30/70 = 25.71, 60 * 40/70 = 34.29
    assert erk_keep_counts(linear_net(10, 20, 20), 0.9) == {"0": 26, "1": 34}


def test_erk_by_hand_with_a_full_layer():
    # sizes 100 and 4, budget 52; 52 * 20/25 = 41.6 and 52 * 5/25 = 10.4 of 4: full
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(4, 1))
    assert erk_keep_counts(model, 0.5) == {"0": 48, "1": 4}


def test_erk_by_hand_distributes_the_rest_of_a_full_layer_in_proportion():
    # budget 1949 over 200 + 40 + 20: the last would get 149.9 of its 100; 1849 / 240 = 7.704
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(20, 20), nn.Linear(10, 10))
    assert keep_count(10_500, 0.8143) == 1949
    assert erk_keep_counts(model, 0.8143) == {"0": 1541, "1": 308, "2": 100}


def test_erk_by_hand_where_a_full_layer_fills_another():
    # sizes 100, 12, 2 and budget 95: round one fills the last two at once or one after the other
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(6, 2), nn.Linear(2, 1))
    assert keep_count(114, 0.16) == 95
    assert erk_keep_counts(model, 0.16) == {"0": 81, "1": 12, "2": 2}


def test_erk_counts_the_kernel_among_the_dimensions():
    # sizes 2*4*3*3 = 72 and 4*18 = 72; raw 2+4+3+3 = 12 and 22; budget 34
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(18, 4))
    assert keep_count(144, 0.76) == 34
    assert erk_keep_counts(model, 0.76) == {"0": 12, "1": 22}


@given(nets(), SPARSITIES)
def test_erk_sums_to_the_budget_exactly_within_every_layer(model, sparsity):
    counts = erk_keep_counts(model, sparsity)
    assert sum(counts.values()) == keep_count(weight_count(model), sparsity)
    for name, module in prunable(model).items():
        assert 0 <= counts[name] <= module.weight.numel()


@given(nets(), SPARSITIES)
def test_erk_is_within_one_weight_of_shares_with_one_common_scale(model, sparsity):
    """The scale is found here by bisection on sum(min(size, scale * raw)) = budget."""
    counts = erk_keep_counts(model, sparsity)
    shapes = {name: module.weight.shape for name, module in prunable(model).items()}
    budget = keep_count(weight_count(model), sparsity)
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        total = sum(min(math.prod(s), scale * sum(s)) for s in shapes.values())
        low, high = (scale, high) if total < budget else (low, scale)
    for name, shape in shapes.items():
        # A full layer must hold all its weights. Another layer gets the rest of the rounding.
        assert abs(counts[name] - min(math.prod(shape), high * sum(shape))) <= 1 + 1e-6


@given(nets(), SPARSITIES)
def test_erk_density_falls_with_the_size_of_a_layer_relative_to_its_dimensions(model, sparsity):
    counts = erk_keep_counts(model, sparsity)
    shapes = {name: module.weight.shape for name, module in prunable(model).items()}
    order = sorted(shapes, key=lambda name: sum(shapes[name]) / math.prod(shapes[name]))
    for sparse, dense in itertools.pairwise(order):
        # each count may be off by one through rounding
        assert (counts[sparse] - 1) / math.prod(shapes[sparse]) <= (
            (counts[dense] + 1) / math.prod(shapes[dense])
        )


# ---------------------------------------------------------------- masks


def test_top_k_mask_keeps_the_largest_of_any_shape():
    score = torch.tensor([[[3.0, -1.0], [0.5, 2.0]]])
    assert top_k_mask(score, 2).tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize("k", range(7))
def test_top_k_mask_is_exact_among_ties(k):
    for score in (torch.zeros(2, 3), torch.tensor([[1.0, 1, 0], [0, 1, 1]])):
        mask = top_k_mask(score, k)
        assert mask.dtype == torch.bool
        assert mask.shape == score.shape
        assert int(mask.sum()) == k
        if 0 < k < 6:
            assert score[mask].min() >= score[~mask].max()


@given(st.integers(1, 300), st.integers(0, 10**6), st.data())
def test_top_k_mask_equals_a_sort(n, seed, data):
    k = data.draw(st.integers(0, n))
    score = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    expected = sorted(range(n), key=lambda i: -float(score[i]))[:k]
    assert top_k_mask(score, k).nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_scores_that_are_not_finite_are_refused(value, k):
    for score in (torch.ones(6), torch.arange(6.0)):
        score[2] = value
        with pytest.raises(TrainingError, match="1 of 6 scores of weights are not finite"):
            top_k_mask(score, k)


def test_finite_scores_with_an_infinite_sum_are_ranked():
    assert top_k_mask(torch.tensor([3e38, 1e38, 2e38]), 1).tolist() == [True, False, False]


def test_top_k_mask_needs_no_gradient():
    assert not top_k_mask(torch.rand(4, requires_grad=True), 2).requires_grad


def test_masked_weight_and_gradient_by_hand():
    model = linear_net(2, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 5.0]]))
    apply_masks(model, {"0": torch.tensor([[True, False]])})
    output = model(torch.tensor([[3.0, 7.0]]))
    assert output.item() == 6.0
    output.sum().backward()
    original = model[0].parametrizations.weight.original
    assert original.grad.tolist() == [[3.0, 0.0]]
    assert torch.equal(model[0].weight.detach(), torch.tensor([[2.0, 0.0]]))


def test_mask_is_saved_and_is_not_trained():
    module = Masked(torch.tensor([True, False]))
    assert list(module.state_dict()) == ["mask"]
    assert not list(module.parameters())


def test_masked_weights_stay_zero_under_momentum_and_weight_decay():
    model = conv_net()
    masks = magnitude_masks(model, 0.5)
    apply_masks(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.rand(4, 1, 4, 4)).square().sum().backward()
        optimizer.step()
        assert nonzero_count(model) == sum(int(mask.sum()) for mask in masks.values())
    for name, module in prunable(model).items():
        assert torch.equal(module.weight != 0, masks[name])


def test_magnitude_masks_keep_the_same_share_of_every_layer():
    model = conv_net(3)
    masks = magnitude_masks(model, 0.9)
    for name, module in prunable(model).items():
        weight, mask = module.weight.detach().abs(), masks[name]
        assert int(mask.sum()) == layer_keep_count(weight.numel(), 0.9)
        assert weight[mask].min() >= weight[~mask].max()


# ---------------------------------------------------------------- plain networks


def masked_net():
    model = conv_net()
    model(torch.rand(8, 1, 4, 4))  # to change the running statistics
    apply_masks(model, magnitude_masks(model, 0.8))
    return model.eval()


def test_plain_state_fills_a_plain_network_that_computes_the_same():
    model, images = masked_net(), torch.rand(5, 1, 4, 4)
    state = plain_state(model)
    plain = conv_net()
    plain.load_state_dict(state)  # strict: no unknown key, no missing key
    assert torch.equal(plain.eval()(images), model(images))
    assert nonzero_count(plain) == nonzero_count(model) == layer_keep_count(18, 0.8) + 20


def test_plain_state_is_a_copy_without_gradients():
    model = masked_net()
    state = plain_state(model)
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    assert not any(value.requires_grad for value in state.values())


def test_plain_state_leaves_the_model_parametrised():
    model = masked_net()
    plain_state(model)
    assert all(parametrize.is_parametrized(m, "weight") for m in prunable(model).values())


def test_bake_keeps_the_function_and_the_exact_zeros():
    model, images = masked_net(), torch.rand(5, 1, 4, 4)
    nonzero, output, state = nonzero_count(model), model(images), plain_state(model)
    bake(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert torch.equal(model(images), output)
    assert nonzero_count(model) == nonzero
    assert set(model.state_dict()) == set(conv_net().state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_bake_does_not_change_trainable_weights_and_plain_networks():
    model = conv_net()
    before = model[0].weight
    bake(model)
    assert model[0].weight is before
    masked = masked_net()
    bake(masked)
    assert all(isinstance(m.weight, nn.Parameter) for m in prunable(masked).values())


# ---------------------------------------------------------------- ideal gas quotas


def test_quotas_by_hand():
    # 10 and 90 weights, 12 of them nonzero: 10 / (1 + 10 F) + 90 / (1 + 90 F) = 12 at F = 0.1444;
    # the shares are 4.1 and 7.9.
    assert quota_keep_counts(linear_net(10, 1, 90), 0.88) == {"0": 4, "1": 8}


@given(model=nets(), sparsity=SPARSITIES)
def test_quotas_are_within_one_weight_of_one_common_quota(model, sparsity):
    found = quota_keep_counts(model, sparsity)
    sizes = {name: module.weight.numel() for name, module in prunable(model).items()}
    budget = keep_count(sum(sizes.values()), sparsity)
    assert sum(found.values()) == budget
    assert all(0 <= found[name] <= size for name, size in sizes.items())

    def total(force):
        return sum(size / (1 + force * size) for size in sizes.values())

    low, high = 0.0, 1e6
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > budget else (low, middle)
    if sparsity > 0 and total(1e6) < budget:
        for name, size in sizes.items():
            assert abs(found[name] - size / (1 + low * size)) <= 1 + 1e-3


# ---------------------------------------------------------------- other masks, effective weights


def test_random_masks_have_the_counts_and_follow_the_generator():
    model, counts = linear_net(5, 4, 3), {"0": 7, "1": 0}
    one, same, other = (
        random_masks(model, counts, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert {name: int(mask.sum()) for name, mask in one.items()} == counts
    assert {name: mask.shape for name, mask in one.items()} == {"0": (4, 5), "1": (3, 4)}
    assert all(mask.dtype == torch.bool for mask in one.values())
    assert torch.equal(one["0"], same["0"])
    assert not torch.equal(one["0"], other["0"])


def test_global_masks_keep_the_largest_weights_of_all_layers_together():
    scores = {"a": torch.tensor([[9.0, 1.0], [5.0, 3.0]]), "b": torch.tensor([4.0, 8.0, 2.0])}
    masks = global_masks(scores, 4)
    assert masks["a"].tolist() == [[True, False], [True, False]]
    assert masks["b"].tolist() == [True, True, False]


def test_effective_weights_are_computed_once_and_with_gradients():
    class Counted(Masked):
        formed = 0

        def forward(self, weight):
            Counted.formed += 1
            return super().forward(weight)

    layer = nn.Linear(3, 2, bias=False)
    parametrize.register_parametrization(layer, "weight", Counted(torch.ones(2, 3)))
    Counted.formed = 0
    x = torch.ones(1, 3)
    with effective_weights(layer):
        with torch.no_grad():
            layer(x)
        layer(x).sum().backward()
    assert Counted.formed == 1
    assert torch.equal(layer.parametrizations.weight.original.grad, torch.ones(2, 3))


@pytest.mark.parametrize("bias", [True, False])
def test_bake_keeps_the_weight_as_the_first_parameter(bias):
    layer = nn.Linear(3, 2, bias=bias)
    before = [name for name, _ in layer.named_parameters()]
    model = nn.Sequential(layer)
    apply_masks(model, {"0": torch.ones(2, 3)})
    bake(model)
    assert [name for name, _ in layer.named_parameters()] == before
