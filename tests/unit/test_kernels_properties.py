"""Sparse kernels against dense convolutions in float64, over drawn layers; bounds of their errors.

The bound of a sum of k products in floating point, in any order: k * eps * the sum of the absolute
values of the products (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1,
with eps = 2u: half of it is for the rounding of the reference).
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robsparse.kernels.geometry import Geometry
from robsparse.kernels.library import library
from robsparse.kernels.maps import images_innermost
from robsparse.kernels.patterns import Pattern, SparseConvolution

pytestmark = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built here")


def available():
    """The instruction sets of this processor."""
    kernels, found = library(), []
    before = kernels.instructions() if kernels else ""
    for name in ("avx512", "avx2", "plain") if kernels else ():
        try:
            kernels.use(name)
            found.append(name)
        except ValueError:
            pass
    if kernels:
        kernels.use(before)
    return found


@pytest.fixture(autouse=True)
def as_before():
    """Restore the instruction set and the number of threads."""
    instructions, threads = library().instructions(), torch.get_num_threads()
    yield
    library().use(instructions)
    torch.set_num_threads(threads)


@dataclass
class Layer:
    """A drawn layer and maps for it. weight: with zeros at the dormant positions, which are few or
    many; whole output channels and whole input channels may be dormant."""

    geometry: Geometry
    weight: Tensor
    active: Tensor
    bias: Tensor
    x: Tensor
    upstream: Tensor
    other: Tensor  # like the output
    gate: Tensor  # like the input

    def sparse(self):
        """The layer for the kernels."""
        positions = self.active.flatten().nonzero().squeeze(1)
        pattern = Pattern(self.geometry, positions, self.weight.dtype)
        return SparseConvolution(pattern, self.weight.flatten()[positions])

    def conv(self, x, weight, bias):
        """Return the dense convolution."""
        g = self.geometry
        return F.conv2d(x, weight, bias, g.stride, g.padding, g.dilation)

    def dense(self, *, absolute=False):
        """Return output, input gradient and gradient of the active weights in float64, without
        ReLU, other map and gate. absolute: with the absolute values of all numbers."""
        x, weight, bias, up = (
            t.abs().double() if absolute else t.double()
            for t in (self.x, self.weight, self.bias, self.upstream)
        )
        x.requires_grad_(), weight.requires_grad_()
        y = self.conv(x, weight, bias)
        gradients = torch.autograd.grad(y, (x, weight), up)
        return y.detach(), gradients[0], gradients[1][self.active]


def side(draw, kernel, stride, padding, dilation):
    """Draw a side of a map: at least as large as the kernel, and small."""
    reach = (kernel - 1) * dilation + 1 - 2 * padding
    least = max(1, reach)
    return draw(st.integers(least, least + 5))


@st.composite
def layers(draw, dtypes=(torch.float32, torch.float64), most_images=300):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel, stride, padding, dilation = pair(1, 7), pair(1, 4), pair(0, 3), pair(1, 2)
    size = tuple(
        side(draw, *numbers) for numbers in zip(kernel, stride, padding, dilation, strict=True)
    )
    shape = (*pair(1, 5), *kernel)
    images = draw(st.one_of(st.integers(1, 20), st.integers(1, most_images)))
    density = draw(st.one_of(st.sampled_from([0.0, 0.02, 1.0]), st.floats(0, 1)))
    dtype = draw(st.sampled_from(dtypes))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*numbers):
        return torch.randn(numbers, generator=noise, dtype=dtype)

    active = torch.rand(shape, generator=noise) < density
    active[draw(st.integers(0, shape[0])) :: 2] = False
    active[:, draw(st.integers(0, shape[1])) :: 2] = False
    x, weight = normal(images, shape[1], *size), normal(*shape) * active
    out = F.conv2d(x[:1], weight, None, stride, padding, dilation).shape[2:]
    return Layer(
        Geometry(shape, size, tuple(out), stride, padding, dilation), weight, active,
        normal(shape[0]), x, normal(images, shape[0], *out), normal(images, shape[0], *out),
        normal(images, shape[1], *size),
    )  # fmt: skip


def assert_within(found, expected, bound):
    error = (found.double() - expected).abs()
    assert bool((error <= bound).all()), float((error / bound).nan_to_num(0).max())


checked = settings(max_examples=120, deadline=None, derandomize=True)
sets = st.sampled_from(available() or ["plain"])


@checked
@given(layers(), sets, st.booleans())
def test_products_are_within_the_bound_of_rounding(layer, instructions, rectified):
    library().use(instructions)
    g, sparse, eps = layer.geometry, layer.sparse(), torch.finfo(layer.x.dtype).eps
    x, up, other, gate = map(images_innermost, (layer.x, layer.upstream, layer.other, layer.gate))
    (y, dx, dw), (y_most, dx_most, dw_most) = layer.dense(), layer.dense(absolute=True)
    outputs, inputs, lines, columns = g.weight

    terms = inputs * lines * columns + 3
    y, y_most = y + other.double(), y_most + other.double().abs()
    found = sparse.output(x, layer.bias, other, rectified=rectified)
    assert_within(found, y.relu() if rectified else y, terms * eps * y_most)

    terms = outputs * lines * columns + 3
    dx, dx_most = dx + gate.double(), dx_most + gate.double().abs()
    found = sparse.input_gradient(up, gate, gate)
    assert_within(found, torch.where(gate > 0, dx, 0), terms * eps * dx_most)
    assert not found[gate <= 0].any()

    terms = len(layer.x) * g.out[0] * g.out[1]
    assert_within(sparse.weight_gradient(x, up), dw, terms * eps * dw_most)


@checked
@given(layers(), sets)
def test_bits_depend_neither_on_threads_nor_on_the_other_images(layer, instructions):
    library().use(instructions)
    sparse, few = layer.sparse(), len(layer.x) // 2 + 1
    x, up = images_innermost(layer.x), images_innermost(layer.upstream)

    def products():
        return (
            sparse.output(x, layer.bias),
            sparse.input_gradient(up),
            sparse.weight_gradient(x, up),
        )

    torch.set_num_threads(1)
    once = products()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, once, products()))
    first = images_innermost(layer.x[:few]), images_innermost(layer.upstream[:few])
    assert torch.equal(sparse.output(first[0], layer.bias), once[0][:few])
    assert torch.equal(sparse.input_gradient(first[1]), once[1][:few])


class Function(torch.autograd.Function):
    """A convolution on the kernels, for torch.autograd.gradcheck."""

    @staticmethod
    def forward(ctx, x, values, bias, pattern):
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        return SparseConvolution(pattern, values).output(images_innermost(x), bias)

    @staticmethod
    def backward(ctx, upstream):
        x, values = ctx.saved_tensors
        sparse = SparseConvolution(ctx.pattern, values)
        x, up = images_innermost(x), images_innermost(upstream)
        gradients = sparse.input_gradient(up), sparse.weight_gradient(x, up), up.sum((0, 2, 3))
        return *gradients, None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers(dtypes=(torch.float64,), most_images=3), sets)
def test_gradients_are_those_of_finite_differences(layer, instructions):
    library().use(instructions)
    sparse = layer.sparse()
    inputs = [t.requires_grad_() for t in (layer.x[:2], sparse.values, layer.bias)]
    torch.autograd.gradcheck(lambda *given: Function.apply(*given, sparse.pattern), inputs)


# ---------------------------------------------------------------- NaN and infinity


@checked
@given(layers(most_images=40), sets, st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_nan_and_infinity_go_where_a_dense_convolution_of_active_weights_sends_them(
    layer, instructions, value
):
    """Every weight is active, and the gradient of the weights is that of a finite upstream: a dense
    convolution also multiplies by dormant zeros and by the zeros of the padding."""
    library().use(instructions)
    layer.active = torch.ones_like(layer.active)
    layer.weight = layer.weight.where(layer.weight != 0, 0.5)
    layer.x.flatten()[:: max(7, layer.x.numel() // 3)] = value
    sparse, (y, _, dw) = layer.sparse(), layer.dense()
    x, up = images_innermost(layer.x), images_innermost(layer.upstream)
    pairs = [
        (sparse.output(x, layer.bias), y),
        (sparse.output(x, layer.bias, rectified=True), y.relu()),
        (sparse.weight_gradient(x, up), dw),
    ]
    layer.upstream.flatten()[:: max(7, layer.upstream.numel() // 3)] = value
    pairs.append((sparse.input_gradient(images_innermost(layer.upstream)), layer.dense()[1]))
    for found, expected in pairs:
        tolerance = 1e-4 if found.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=10 * tolerance, equal_nan=True
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dormant_weights_multiply_nothing(value):
    """A deliberate difference from a dense convolution, for which 0 * NaN is NaN."""
    weight = torch.randn(2, 2, 3, 3)
    weight[:, 1] = 0
    positions = weight.flatten().nonzero().squeeze(1)
    pattern = Pattern(Geometry((2, 2, 3, 3), (5, 5), (3, 3)), positions, torch.float32)
    sparse = SparseConvolution(pattern, weight.flatten()[positions])
    x = torch.randn(40, 2, 5, 5)
    expected = sparse.output(images_innermost(x))
    x[:, 1] = value
    assert F.conv2d(x, weight).isnan().all()
    assert torch.equal(sparse.output(images_innermost(x)), expected)


def test_nan_in_a_gate_lets_the_gradient_pass_as_in_torch():
    pattern = Pattern(Geometry((1, 1, 1, 1), (1, 1), (1, 1)), torch.tensor([0]), torch.float32)
    up = torch.ones(20, 1, 1, 1)
    gate = torch.tensor([float("nan"), -1.0, 0.0, 1.0] * 5).reshape(up.shape).requires_grad_()
    (expected,) = torch.autograd.grad(gate.relu(), gate, up)
    sparse = SparseConvolution(pattern, torch.ones(1))
    found = sparse.input_gradient(images_innermost(up), None, images_innermost(gate.detach()))
    assert torch.equal(found, expected)
