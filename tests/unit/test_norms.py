"""Batch norm on the kernel against torch in float64, over drawn maps; bounds of its errors.

eps is that of the type of the map (2u), and k the most numbers that one lane of a sum adds before
the sums go to double precision. So a mean differs by at most k * eps * the mean of the absolute
values (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2). The other
bounds follow from the formulas, with absolute values for all terms and a factor of 4.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robsparse.kernels.library import library
from robsparse.kernels.maps import images_innermost
from robsparse.kernels.norms import BatchNorm

pytestmark = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built here")

SETS = ("avx512", "avx2", "plain")
ROWS = 16  # SUMMED in _kernels.c
PIXELS = (0, 2, 3)  # the dimensions of a sum


def use(instructions):
    """Use an instruction set, or the best one if this processor does not have it."""
    try:
        library().use(instructions)
    except ValueError:
        library().use("")


@pytest.fixture(autouse=True)
def as_before():
    """Restore the instruction set and the number of threads."""
    instructions, threads = library().instructions(), torch.get_num_threads()
    yield
    library().use(instructions)
    torch.set_num_threads(threads)


@dataclass
class Case:
    """Maps in the layout of the kernels. after: nothing, a ReLU, or a sum and a ReLU."""

    x: Tensor
    upstream: Tensor
    other: Tensor | None
    norm: BatchNorm
    after: str

    def found(self):
        """Return results and gradients of the kernel: y, statistics, (dx, dw, db, dother)."""
        rectified = self.after != "nothing"
        y, statistics = self.norm.output(self.x, self.other, rectified=rectified)
        return y, statistics, self.norm.gradients(
            self.x, self.upstream, statistics, rectified=rectified,
            gate=None if self.other is None else y,
        )  # fmt: skip


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64), most_images=300):
    images = draw(st.one_of(st.integers(1, 20), st.integers(1, most_images)))
    channels = draw(st.one_of(st.integers(1, 4), st.sampled_from([63, 65, 130])))
    size = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    if images * size[0] * size[1] == 1:
        images = 2
    dtype = draw(st.sampled_from(dtypes))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale, shift = draw(st.sampled_from([(1, 0), (1, 30), (1e-3, 0), (100, -5)]))
    after = draw(st.sampled_from(["nothing", "relu", "sum and relu"]))
    affine = draw(st.booleans())

    def normal(*shape):
        return torch.randn(shape, generator=noise, dtype=dtype)

    x, upstream, other = (images_innermost(normal(images, channels, *size)) for _ in range(3))
    weight, bias = (normal(channels) if affine else None for _ in range(2))
    return Case(
        x * scale + shift, upstream, other if after == "sum and relu" else None,
        BatchNorm(weight, bias, draw(st.sampled_from([1e-5, 1e-3]))), after,
    )  # fmt: skip


def assert_within(found, expected, bound):
    error = (found.double() - expected).abs()
    assert bool((error <= bound).all()), float((error / bound).nan_to_num(0).max())


def by_channel(values):
    return values[:, None, None]


checked = settings(max_examples=120, deadline=None, derandomize=True)


@checked
@given(cases(), st.sampled_from(SETS))
def test_results_are_those_of_torch_within_the_bound_of_rounding(case, instructions):
    use(instructions)
    x, upstream = case.x.double().requires_grad_(), case.upstream.double()
    channels, numbers = x.shape[1], x[:, 0].numel()
    weight, bias = (
        default(channels).double() if given is None else given.double()
        for given, default in ((case.norm.weight, torch.ones), (case.norm.bias, torch.zeros))
    )
    weight.requires_grad_(), bias.requires_grad_()
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=case.norm.eps)
    found, statistics, (dx, dw, db, dother) = case.found()

    eps = torch.finfo(case.x.dtype).eps
    k = ROWS + -(-len(x) // (16 // case.x.element_size())) + 4
    variance, mean = torch.var_mean(x.detach(), PIXELS, correction=0)
    size = x.detach().abs() + by_channel(x.detach().abs().mean(PIXELS))  # of x - mean
    spread = variance + case.norm.eps
    scale = by_channel(weight.detach().abs() * spread.rsqrt())
    assert_within(statistics.mean, mean, k * eps * x.detach().abs().mean(PIXELS))
    assert_within(statistics.variance, variance, 4 * k * eps * (size**2).mean(PIXELS))

    expected = y.detach() if case.other is None else y.detach() + case.other.double()
    most = scale * size * by_channel(1 + (size**2).mean(PIXELS) / spread)
    most = most + by_channel(bias.detach().abs()) + expected.abs()
    rectified = case.after != "nothing"
    assert_within(found, expected.relu() if rectified else expected, 4 * k * eps * most)

    gated = torch.where(found > 0, upstream, 0) if rectified else upstream
    gradients = torch.autograd.grad(y, (x, weight, bias), gated)
    most_bias = gated.abs().sum(PIXELS)
    most_product = (gated.abs() * size).sum(PIXELS)
    most_weight = most_product * spread.rsqrt() * (1 + (size**2).mean(PIXELS) / spread)
    most_x = gated.abs() + by_channel(most_bias / numbers)
    most_x = most_x + size * by_channel(most_product / numbers / spread)
    most_x = scale * most_x * by_channel(1 + (size**2).mean(PIXELS) / spread)
    assert_within(db, gradients[2], 4 * k * eps * most_bias)
    assert_within(dw, gradients[1], 4 * k * eps * most_weight)
    assert_within(dx, gradients[0], 4 * k * eps * most_x)
    assert (dother is None) == (case.other is None)
    if dother is not None:
        assert torch.equal(dother.double(), gated)


@checked
@given(cases(), st.sampled_from(SETS))
def test_bits_do_not_depend_on_threads(case, instructions):
    use(instructions)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        y, statistics, gradients = case.found()
        tensors = [y, statistics.mean, statistics.variance, *gradients]
        results.append([tensor for tensor in tensors if tensor is not None])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


class Function(torch.autograd.Function):
    """Batch norm on the kernel, for torch.autograd.gradcheck."""

    @staticmethod
    def forward(ctx, *given):
        x, weight, bias, other, rectified = given
        norm = BatchNorm(weight, bias, 1e-3)
        y, ctx.statistics = norm.output(images_innermost(x), other, rectified=rectified)
        ctx.save_for_backward(x, weight, bias, other, y)
        ctx.rectified = rectified
        return y

    @staticmethod
    def backward(ctx, upstream):
        x, weight, bias, other, y = ctx.saved_tensors
        dx, dw, db, dother = BatchNorm(weight, bias, 1e-3).gradients(
            images_innermost(x), images_innermost(upstream), ctx.statistics,
            rectified=ctx.rectified, gate=None if other is None else y,
        )  # fmt: skip
        return dx, dw, db, dother, None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(dtypes=(torch.float64,), most_images=3), st.sampled_from(SETS))
def test_gradients_are_those_of_finite_differences(case, instructions):
    use(instructions)
    x = (case.x[:3, :2, :3, :3] - case.x.mean()).clone()
    x = images_innermost(x / x.std().clamp(min=1e-3) if x.numel() > 1 else x)
    if x[:, 0].numel() == 1:
        return
    other = None if case.other is None else images_innermost(case.other[:3, :2, :3, :3])
    draw = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(x.shape[1], generator=draw).double() for _ in range(2))
    inputs = [x, weight, bias] if other is None else [x, weight, bias, other]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    rectified = case.after != "nothing"

    def function(x, weight, bias, other=None):
        return Function.apply(x, weight, bias, other, rectified)

    torch.autograd.gradcheck(function, inputs, eps=1e-7, atol=1e-4)


def test_variance_of_a_large_mean_is_not_lost():
    """One pass over squares would give 0 or less in float32."""
    draw = torch.Generator().manual_seed(0)
    x = images_innermost(1000 + torch.randn(64, 2, 9, 9, generator=draw) * 0.1)
    _, statistics = BatchNorm(None, None, 1e-5).output(x)
    expected = x.double().var(PIXELS, correction=0)
    torch.testing.assert_close(statistics.variance, expected, rtol=1e-4, atol=0)


def test_nan_reaches_every_result_of_its_channel_through_the_relu():
    x = torch.randn(20, 3, 4, 4)
    x[5, 1, 2, 2] = float("nan")
    y, _ = BatchNorm(None, None, 1e-5).output(images_innermost(x), rectified=True)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_wrong_maps_and_lists_are_refused():
    norm, x = BatchNorm(None, None, 1e-5), images_innermost(torch.randn(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"batch norm: the other map must be torch.float32 of sha"):
        norm.output(x, x[:2])
    with pytest.raises(ValueError, match=r"batch norm: the input must be .* images innermost"):
        norm.output(torch.randn(4, 3, 2, 2))
    with pytest.raises(ValueError, match=r"batch norm: the weight must be 3 numbers of torch.floa"):
        BatchNorm(torch.ones(2), None, 1e-5).output(x)
    for wrong in (x.half(), x[:0], x[0]):
        with pytest.raises(ValueError, match="is not a map with numbers"):
            norm.output(wrong)
    _, statistics = norm.output(x)
    with pytest.raises(ValueError, match=r"batch norm: the gradient must be"):
        norm.gradients(x, x.double(), statistics)
