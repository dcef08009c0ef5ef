"""Convolutions of small maps as matrices: same results in every form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.fast import folding, small_maps
from robsparse.fast.small_maps import SmallMap, choose_form
from robsparse.models._layers import TensorFlowConv2d
from robsparse.sparsity.layers import prunable


@st.composite
def convolutions(draw):
    inputs, outputs, kernel = (draw(st.integers(1, 3)) for _ in range(3))
    dilation = draw(st.integers(1, 2))
    reach = dilation * (kernel - 1) + 1
    height, width = (draw(st.integers(reach, 7)) for _ in range(2))
    if draw(st.booleans()):
        return TensorFlowConv2d(inputs, outputs), (inputs, max(height, 2), max(width, 2))
    options = {"stride": draw(st.integers(1, 3)), "padding": draw(st.integers(0, 2))}
    bias = draw(st.booleans())
    layer = nn.Conv2d(inputs, outputs, kernel, dilation=dilation, bias=bias, **options)
    return layer, (inputs, height, width)


@given(
    made=convolutions(),
    form=st.sampled_from([("dense", True), ("dense", False), ("sparse", True)]),
    density=st.floats(0, 1),
)
def test_both_matrices_agree_with_the_convolution(made, form, density):
    (layer, shape), (kind, columns) = made, form
    layer = layer.double().requires_grad_(False)
    layer.weight.mul_(torch.rand_like(layer.weight) < density)
    x = torch.rand(2, *shape, dtype=torch.float64, requires_grad=True)
    matrix = SmallMap(layer, *shape[1:]).form(kind, layer.weight, layer.bias)
    found, expected = matrix(x, rectified=False, columns=columns), layer(x)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-12)
    upstream = torch.rand_like(expected)
    gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-12)
    rectified = matrix(x, rectified=True, columns=columns)
    assert torch.allclose(rectified, expected.relu(), atol=1e-12)


def test_sparse_matrix_has_only_nonzero_weights():
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).requires_grad_(False)
    layer.weight.zero_()
    layer.weight[1, 0, 1, 1] = 2.0  # the middle tap covers all 16 pixels
    layer.weight[2, 1, 0, 0] = 3.0  # a corner tap misses a row and a column
    matrix = SmallMap(layer, 4, 4).form("sparse", layer.weight, None)
    assert matrix.matrix.values().tolist().count(2.0) == 16
    assert matrix.matrix.values().tolist().count(3.0) == 9
    assert len(matrix.matrix.values()) == len(matrix.transpose.values()) == 25


@pytest.mark.parametrize(
    ("size", "channels", "given", "form"),
    [
        (8, (24, 48), (1.0, True, False), "conv"),  # its matrix has 600,000 entries
        (8, (1, 24), (1.0, True, False), "dense"),
        (8, (1, 24), (1.0, False, False), "dense"),  # few inputs
        (4, (48, 48), (1.0, True, False), "dense"),
        (4, (48, 48), (1.0, False, False), "conv"),
        (8, (24, 48), (0.3, False, False), "sparse"),
        (8, (24, 48), (0.3, True, True), "sparse"),
        (8, (24, 48), (0.31, True, False), "conv"),
        (8, (256, 256), (0.05, True, False), "sparse"),
        (8, (256, 256), (0.06, True, False), "conv"),
        (8, (256, 256), (0.1, True, True), "conv"),
        (8, (256, 256), (0.01, True, True), "sparse"),
        (9, (24, 48), (0.01, True, False), "conv"),
    ],
)
def test_form_depends_on_shapes_and_density(size, channels, given, form):
    density, gradient, bf16 = given
    layer = nn.Conv2d(*channels, 3, padding=1, stride=2 if channels == (48, 48) else 1)
    x = torch.rand(2, channels[0], size, size, requires_grad=gradient)
    assert choose_form(layer, x, density, bf16=bf16) == form


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_other_convolutions_stay_convolutions(options):
    layer = nn.Conv2d(2, 2, 3, **options)
    assert choose_form(layer, torch.rand(1, 2, 4, 4), 0.01, bf16=False) == "conv"


def test_new_view_of_a_sparse_network_has_its_current_nonzero_weights():
    torch.manual_seed(0)
    params = registry.entry("arch", "small_cnn").params(width=8)
    model = models.build("small_cnn", params, (1, 8, 8), 10).double().eval().requires_grad_(False)
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    layers = list(prunable(model).values())
    full = [layer.weight.clone() for layer in layers]
    forms = set()
    for density in (1.0, 0.2, 0.05, 0.0):
        for layer, weight in zip(layers, full, strict=True):
            layer.weight.copy_(weight * (torch.rand_like(weight) < density))
        view = folding.folded_view(model, x)
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                found, expected = view(x), model(x)
            assert torch.allclose(found, expected, atol=1e-12)
        gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (view, model)]
        assert torch.allclose(*gradients, atol=1e-10)
        convolutions = [layer for layer in view.snapshot.layers if hasattr(layer, "full")]
        forms |= {form for layer in convolutions for _, form in layer._matrices}
    assert forms == {"dense", "sparse"}


def test_matrices_are_computed_once_for_each_snapshot(monkeypatch):
    formed = []
    form = SmallMap.form
    monkeypatch.setattr(
        SmallMap, "form", lambda self, *given: formed.append(1) or form(self, *given)
    )
    params = registry.entry("arch", "small_cnn").params()
    model = models.build("small_cnn", params, (1, 8, 8), 10).eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    folding.folded_view(model, x)  # compares view and network
    formed.clear()
    for refreshed in (1, 2):
        view = folding.folded_view(model, x)
        for _ in range(3):
            view(x)
        assert len(formed) == 2 * refreshed  # the first and the last convolution
    assert small_maps.PIXELS == 64
