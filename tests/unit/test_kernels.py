"""Sparse kernels against dense convolutions in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from robsparse.kernels.geometry import Geometry
from robsparse.kernels.library import library
from robsparse.kernels.maps import images_innermost
from robsparse.kernels.patterns import Pattern, SparseConvolution

pytestmark = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built here")

# images, inputs, outputs, kernel, stride, padding, dilation, size, density
CASES = [
    (1, 3, 5, (3, 3), (1, 1), (1, 1), (1, 1), (6, 7), 0.3),
    (64, 4, 6, (3, 3), (1, 1), (1, 1), (1, 1), (8, 8), 0.1),
    (130, 4, 6, (3, 3), (2, 2), (1, 1), (1, 1), (9, 8), 0.2),
    (17, 4, 6, (3, 5), (2, 3), (1, 2), (2, 1), (13, 12), 0.5),
    (70, 3, 4, (1, 1), (2, 2), (0, 0), (1, 1), (8, 8), 0.5),
    (33, 3, 4, (2, 2), (2, 2), (0, 0), (1, 1), (8, 8), 0.0),
    (100, 2, 2, (3, 3), (3, 3), (0, 0), (1, 1), (7, 7), 1.0),
    (2, 3, 4, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1.0),  # a map smaller than the stride
]


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_those_of_a_dense_convolution(case, instructions):
    images, inputs, outputs, kernel, stride, padding, dilation, size, density = case
    kernels = library()
    before = kernels.instructions()
    try:
        kernels.use(instructions)
    except ValueError as error:
        pytest.skip(str(error))
    draw = torch.Generator().manual_seed(1)
    shape = (outputs, inputs, *kernel)
    mask = torch.rand(shape, generator=draw) < density
    weight = torch.randn(shape, generator=draw, dtype=torch.float64) * mask
    bias = torch.randn(outputs, generator=draw, dtype=torch.float64)
    x = torch.randn(images, inputs, *size, generator=draw, dtype=torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    upstream, other = (torch.randn(y.shape, generator=draw, dtype=y.dtype) for _ in range(2))
    x_gradient, weight_gradient = torch.autograd.grad(y, (x, weight), upstream)
    positions = mask.flatten().nonzero().squeeze(1)
    geometry = Geometry(shape, size, (y.shape[2], y.shape[3]), stride, padding, dilation)
    pattern = Pattern(geometry, positions, torch.float64)
    sparse = SparseConvolution(pattern, weight.detach().flatten()[positions])
    rows, up = images_innermost(x.detach()), images_innermost(upstream)
    try:
        torch.testing.assert_close(sparse.output(rows, bias), y)
        fused = sparse.output(rows, bias, images_innermost(other), rectified=True)
        torch.testing.assert_close(fused, (y + other).relu())
        torch.testing.assert_close(sparse.input_gradient(up), x_gradient)
        gated = sparse.input_gradient(up, rows, rows)
        torch.testing.assert_close(gated, torch.where(x > 0, x_gradient + x, 0))
        found = sparse.weight_gradient(rows, up)
        torch.testing.assert_close(found, weight_gradient.flatten()[positions])
    finally:
        kernels.use(before)


# ---------------------------------------------------------------- what is refused

GEOMETRY = Geometry((4, 3, 3, 3), (6, 6), (6, 6), padding=(1, 1))
POSITIONS = torch.tensor([1, 5, 100])


def small():
    """A sparse convolution, its input and the gradient of its output."""
    sparse = SparseConvolution(Pattern(GEOMETRY, POSITIONS, torch.float32), torch.ones(3))
    x, up = (images_innermost(torch.randn(5, c, 6, 6)) for c in (3, 4))
    return sparse, x, up


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": (4, 3, 3, 0)},
        {"stride": (0, 1)},
        {"padding": (-1, 0)},
        {"dilation": (1, 0)},
        {"size": (0, 6)},
        {"weight": (4, 3, 65, 1)},
        {"stride": (32, 32)},
        {"size": (2**15, 2**15)},
        {"weight": (2**15, 2**15, 3, 3)},
    ],
    ids=str,
)
def test_geometry_that_the_kernels_cannot_compute_is_refused(changed):
    with pytest.raises(ValueError, match="sparse convolution: Geometry"):
        dataclasses.replace(GEOMETRY, **changed)


@pytest.mark.parametrize(
    "positions",
    [
        torch.tensor([5, 1]),
        torch.tensor([1, 1]),
        torch.tensor([-1, 1]),
        torch.tensor([1, 108]),
        torch.tensor([1, 5], dtype=torch.int32),
        torch.tensor([[1, 5]]),
        torch.tensor([1, 5], device="meta"),
    ],
    ids=str,
)
def test_positions_that_are_not_increasing_indices_are_refused(positions):
    with pytest.raises(ValueError, match="sparse convolution: positions must be"):
        Pattern(GEOMETRY, positions, torch.float32)


def test_type_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="float32 or float64 is needed"):
        Pattern(GEOMETRY, POSITIONS, torch.float16)


@pytest.mark.parametrize("values", [torch.ones(2), torch.ones(3).double(), torch.ones(3, 1)])
def test_values_of_another_number_or_type_are_refused(values):
    with pytest.raises(ValueError, match="sparse convolution: values must be 3 numbers of torch"):
        SparseConvolution(Pattern(GEOMETRY, POSITIONS, torch.float32), values)


WRONG = {
    "type": lambda x: images_innermost(x.double()),
    "layout": lambda x: x.contiguous(),
    "images": lambda x: images_innermost(x[:-1]),
    "channels": lambda x: images_innermost(x[:, :-1]),
    "height": lambda x: images_innermost(x[:, :, :-1]),
    "dimensions": lambda x: x[0],
    "device": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_map_of_another_type_shape_or_layout_is_refused(wrong):
    sparse, x, up = small()
    change = WRONG[wrong]
    calls = [
        lambda: sparse.output(x, None, change(up)),
        lambda: sparse.input_gradient(up, change(x)),
        lambda: sparse.input_gradient(up, None, change(x)),
        lambda: sparse.weight_gradient(x, change(up)),
    ]
    if wrong != "images":  # the number of images is that of the first map
        calls += [lambda: sparse.output(change(x)), lambda: sparse.input_gradient(change(up))]
        calls += [lambda: sparse.weight_gradient(change(x), up)]
    for call in calls:
        with pytest.raises(ValueError, match=r"sparse convolution: .* with images innermost"):
            call()


@pytest.mark.parametrize("bias", [torch.ones(3), torch.ones(4).double(), torch.ones(1)])
def test_bias_of_another_number_or_type_is_refused(bias):
    sparse, x, _ = small()
    with pytest.raises(ValueError, match="sparse convolution: the bias must be 4 numbers"):
        sparse.output(x, bias)


def test_values_and_bias_need_not_be_contiguous():
    sparse, x, up = small()
    pairs = torch.randn(4, 2)
    strided = SparseConvolution(sparse.pattern, torch.ones(3, 2)[:, 0])
    expected = sparse.output(x, pairs[:, 0].contiguous())
    assert torch.equal(strided.output(x, pairs[:, 0]), expected)
    assert torch.equal(strided.input_gradient(up), sparse.input_gradient(up))
