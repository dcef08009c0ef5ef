"""The forms of a convolution compute the same function. The cheapest form is chosen."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import RunError
from robsparse.fast import costs, folding
from robsparse.fast.folded_layers import Affine, ConvolutionSource, FoldedConvolution
from robsparse.fast.forms import geometry_of
from robsparse.kernels.library import library
from robsparse.models._layers import TensorFlowConv2d
from robsparse.sparsity.layers import prunable

KINDS = ["channels_last", "channels_first", "matrix"] + ["sparse"] * (library() is not None)


@st.composite
def convolutions(draw):
    inputs, outputs, kernel = (draw(st.integers(1, 3)) for _ in range(3))
    dilation = draw(st.integers(1, 2))
    reach = dilation * (kernel - 1) + 1
    height, width = (draw(st.integers(reach, 7)) for _ in range(2))
    if draw(st.booleans()):
        return TensorFlowConv2d(inputs, outputs), (inputs, max(height, 2), max(width, 2))
    options: dict[str, Any] = {
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, 2)),
    }
    bias = draw(st.booleans())
    layer = nn.Conv2d(inputs, outputs, kernel, dilation=dilation, bias=bias, **options)
    return layer, (inputs, height, width)


def form_of(layer: nn.Conv2d, kind: Any, size: tuple[int, int], *, rectified: bool = False) -> Any:
    source = ConvolutionSource(layer, None, rectified)
    affine = Affine(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    return FoldedConvolution(source, affine, affine).form(kind, size)


@given(made=convolutions(), kind=st.sampled_from(KINDS), density=st.floats(0, 1))
def test_all_forms_agree_with_the_convolution(made, kind, density):
    layer, shape = made
    layer = layer.double().requires_grad_(False)
    layer.weight.mul_(torch.rand_like(layer.weight) < density)
    x = torch.rand(2, *shape, dtype=torch.float64, requires_grad=True)
    form, expected = form_of(layer, kind, shape[1:]), layer(x)
    found = form.output(x.detach(), None, rectified=False)
    assert torch.allclose(found, expected, atol=1e-12)
    other, upstream, gate = (torch.randn_like(like) for like in (expected, expected, x.detach()))
    rectified = form.output(x.detach(), other, rectified=True)
    assert torch.allclose(rectified, (expected + other).relu(), atol=1e-12)
    (slope,) = torch.autograd.grad(expected, x, upstream)
    assert torch.allclose(form.input_gradient(upstream, None, None), slope, atol=1e-12)
    both = form.input_gradient(upstream, x.detach(), gate)
    assert torch.allclose(both, torch.where(gate > 0, slope + x, 0), atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_other_paddings_have_no_forms(options):
    layer = nn.Conv2d(2, 2, 3, **options)
    assert geometry_of(layer, (4, 4)) is None


@given(
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_size_of_the_output_is_that_of_the_layer(size, kernel, stride, padding, dilation):
    layer = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
    assert geometry_of(layer, size).out == tuple(layer(torch.zeros(1, 1, *size)).shape[2:])


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (9, 7)])
def test_size_of_the_output_is_that_of_the_layer_with_the_padding_of_tensorflow(size):
    layer = TensorFlowConv2d(1, 1)
    geometry = geometry_of(layer, size)
    assert geometry.out == tuple(layer(torch.zeros(1, 1, *size)).shape[2:])
    assert geometry.padding == tuple(side % 2 for side in size)


def made(**cost):
    return {"channels_last": 2.0, "channels_first": 3.0, "converted": 4.0, **cost}


@pytest.mark.parametrize(
    ("given", "densities", "chosen"),
    [
        ([made()], [1.0], ["channels_last"]),
        ([made(channels_first=1.0)], [1.0], ["channels_first"]),
        ([made(matrix=1.0)], [1.0], ["matrix"]),
        ([made(sparse=[0.5, 10.0])], [0.1], ["sparse"]),
        ([made(sparse=[0.5, 10.0])], [0.2], ["channels_last"]),
        # The second layer is faster with images innermost, but not if the first one must convert.
        ([made(), made(matrix=1.0)], [1.0, 1.0], ["channels_last"] * 2),
        ([made(), made(sparse=[0.0, 1.0])], [1.0, 0.0], ["channels_last"] * 2),
        ([made(converted=2.1), made(matrix=1.0)], [1.0, 1.0], ["channels_last", "matrix"]),
    ],
)
def test_the_forms_with_the_smallest_total_cost_are_chosen(given, densities, chosen):
    assert costs.choose(given, densities) == chosen


def test_costs_are_measured_once_for_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBSPARSE_COSTS", "measured")
    monkeypatch.setenv("ROBSPARSE_CACHE", str(tmp_path))
    measured = []
    measure = costs._measure
    monkeypatch.setattr(costs, "_measure", lambda *all: measured.append(1) or measure(*all))
    layer = nn.Conv2d(2, 3, 3, padding=1)
    geometry = geometry_of(layer, (4, 4))
    assert geometry is not None
    dtypes = torch.float32, torch.float32
    found = [costs.costs_of(layer, geometry, dtypes, 16)]
    found.append(costs.costs_of(layer, geometry, dtypes, 16))
    costs._table_for.cache_clear()  # like another process
    found.append(costs.costs_of(layer, geometry, dtypes, 16))
    assert found[0] == found[1] == found[2]
    assert len(measured) == 1
    assert set(found[0]) == {"converted", *KINDS}
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    assert [value for key, value in kept.items() if key != "checksum"] == [found[0]]
    costs.costs_of(layer, geometry, dtypes, 64)
    assert len(measured) == 2
    costs._table_for.cache_clear()


@pytest.fixture
def measured_costs(tmp_path, monkeypatch):
    """measured_costs() -> the costs of a layer, as in a new process, and the folder of its file."""
    monkeypatch.setenv("ROBSPARSE_COSTS", "measured")
    monkeypatch.setenv("ROBSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "_seconds", lambda *words, **options: 0.5)
    layer = nn.Conv2d(2, 3, 3, padding=1)
    geometry = geometry_of(layer, (4, 4))

    def find():
        costs._table_for.cache_clear()
        return costs.costs_of(layer, geometry, (torch.float32, torch.float32), 16)

    yield find, tmp_path / "cache"
    costs._table_for.cache_clear()


@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2]", b"3", b'{"a": 3}', b'{"a": {"dense": "many"}}', b'{"a": {"sparse": [1]}}'],
)
def test_damaged_costs_are_measured_again_and_a_line_says_so(content, measured_costs, capsys):
    find, folder = measured_costs
    before = find()
    [path] = folder.glob("*.json")
    path.write_bytes(content)
    assert find() == before
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: damaged")
    assert line.endswith("the costs are measured again")
    assert find() == before  # now the file is whole
    assert not capsys.readouterr().err


def test_costs_with_a_changed_digit_are_not_used(measured_costs, capsys):
    find, folder = measured_costs
    before = find()
    [path] = folder.glob("*.json")
    path.write_text(path.read_text().replace("0.5", "0.7", 1))
    assert find() == before
    assert "its checksum does not fit its content" in capsys.readouterr().err


def test_costs_that_cannot_be_stored_hold_for_the_process(measured_costs, capsys, monkeypatch):
    find, folder = measured_costs

    def full(path, content):
        raise RunError(f"{path}: cannot write this file (No space left on device)")

    monkeypatch.setattr(costs, "write_record", full)
    assert find()["channels_last"] == 0.5
    assert "No space left on device); the measured costs are not stored" in capsys.readouterr().err
    assert not list(folder.glob("*.json"))


@pytest.mark.parametrize(("images", "stands_for"), [(1, 1), (15, 1), (16, 16), (63, 16), (500, 64)])
def test_a_batch_uses_the_costs_of_the_largest_number_that_it_reaches(images, stands_for):
    assert costs.images_class(images) == stands_for


def test_double_precision_is_estimated_without_a_measurement(monkeypatch):
    monkeypatch.setenv("ROBSPARSE_COSTS", "measured")
    monkeypatch.setattr(costs, "_measure", lambda *_: pytest.fail("measured"))
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    geometry = geometry_of(layer, (4, 4))
    assert geometry is not None
    costs.costs_of(layer, geometry, (torch.float64, torch.float64), 16)


def test_new_view_of_a_sparse_network_has_its_current_nonzero_weights():
    torch.manual_seed(0)
    params = registry.entry("arch", "small_cnn").params(width=8)
    model = models.build("small_cnn", params, (1, 8, 8), 10).double().eval().requires_grad_(False)
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    layers = list(prunable(model).values())
    full = [layer.weight.clone() for layer in layers]
    kinds = set()
    for density in (1.0, 0.2, 0.05, 0.0):
        for layer, weight in zip(layers, full, strict=True):
            layer.weight.copy_(weight * (torch.rand_like(weight) < density))
        view: Any = folding.folded_view(model, x)
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                found, expected = view(x), model(x)
            assert torch.allclose(found, expected, atol=1e-12)
        gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (view, model)]
        assert torch.allclose(*gradients, atol=1e-10)
        sizes = view.status.program.execution.sizes[x.shape[1:]]
        kinds |= set(view.snapshot.kinds(sizes, len(x)).values())
    assert kinds >= {"matrix", *KINDS[3:]}


def test_forms_are_made_once_for_each_snapshot(monkeypatch):
    formed = []
    make = FoldedConvolution._make
    monkeypatch.setattr(
        FoldedConvolution, "_make", lambda self, *given: formed.append(1) or make(self, *given)
    )
    params = registry.entry("arch", "small_cnn").params()
    model = models.build("small_cnn", params, (1, 8, 8), 10).eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    folding.folded_view(model, x)  # compares view and network
    formed.clear()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    for refreshed in (1, 2):
        view = folding.folded_view(model, x)
        for _ in range(3):
            view(x)
        assert len(formed) == convolutions * refreshed
