"""Sparse kernels against dense convolutions in float64."""

import pytest
import torch
import torch.nn.functional as F

from robsparse.kernels.geometry import Geometry
from robsparse.kernels.library import library
from robsparse.kernels.patterns import Pattern, SparseConvolution, images_innermost

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
