"""Pooling of maps with images innermost against torch: the same bits, and the kernel is used."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robsparse.fast.folding import folded_view
from robsparse.kernels import pools
from robsparse.kernels.library import library
from robsparse.kernels.maps import images_innermost
from robsparse.models import vgg
from robsparse.sparsity.masks import apply_masks, effective_weights, magnitude_masks

pytestmark = pytest.mark.skipif(library() is None, reason="the sparse kernels are not built here")


@st.composite
def maps(draw):
    images = draw(st.one_of(st.integers(1, 20), st.integers(1, 200)))
    shape = (images, draw(st.integers(1, 5)), draw(st.integers(3, 9)), draw(st.integers(3, 9)))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randn(shape, generator=noise, dtype=dtype)
    return draw(st.sampled_from([x, x.round()]))  # rounded: several numbers are the largest


@pytest.fixture
def calls(monkeypatch):
    """Whether the kernel computed each result."""
    found, apply = [], pools._Pooling.apply
    monkeypatch.setattr(pools._Pooling, "apply", lambda *given: found.append(1) or apply(*given))
    return found


def assert_same(x, fast, plain):
    """Compare results and gradients for a map with images innermost and one as torch wants it."""
    results = []
    for function, batch in ((fast, images_innermost(x)), (plain, x.contiguous())):
        leaf = batch.detach().requires_grad_()
        y = function(leaf)
        slopes = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        results.append((y, torch.autograd.grad(y, leaf, slopes)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(maps(), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["avx512", "avx2", "plain"]))
def test_largest_numbers_and_their_gradients_are_those_of_torch(x, lines, columns, instructions):
    before = library().instructions()
    try:
        library().use(instructions)
    except ValueError:
        return
    window = lines, columns
    try:
        assert_same(x, lambda x: pools.max_pool(x, window), lambda x: F.max_pool2d(x, window))
    finally:
        library().use(before)


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (2, 2)])
@pytest.mark.parametrize("images", [1, 5, 70])
def test_means_of_equal_parts_and_their_gradients_are_those_of_torch(size, images, calls):
    x = torch.randn(images, 3, *size)
    assert_same(x, lambda x: pools.mean_pool(x, (2, 2)), lambda x: F.adaptive_avg_pool2d(x, 2))
    assert calls == [1]


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"padding": 1}, {"dilation": 2}, {"ceil_mode": True}, {"stride": (3, 2)}],
    ids=str,
)
def test_other_windows_are_left_to_torch(options, calls):
    x = torch.randn(3, 2, 7, 7)
    assert_same(
        x, lambda x: pools.max_pool(x, 2, **options), lambda x: F.max_pool2d(x, 2, **options)
    )
    assert not calls
    pools.max_pool(images_innermost(x), 2, stride=2, padding=0)
    assert calls


def test_other_maps_are_left_to_torch(calls):
    x = torch.randn(3, 2, 7, 7)
    for other in (x, x[0], x.to(torch.bfloat16)):
        assert torch.equal(pools.max_pool(other, 2), F.max_pool2d(other, 2))
    for size in (2, (3, None), (1, 1)):
        found = pools.mean_pool(images_innermost(x), size)
        torch.testing.assert_close(found, F.adaptive_avg_pool2d(x, size))
    assert not calls


def test_nan_is_the_largest_number():
    x = torch.zeros(20, 1, 4, 4)
    x[3, 0, 1, 1] = float("nan")
    assert_equal = torch.testing.assert_close
    assert_equal(pools.max_pool(images_innermost(x), 2), F.max_pool2d(x, 2), equal_nan=True)


def test_view_of_a_sparse_network_pools_on_the_kernel(calls):
    torch.manual_seed(0)
    model = vgg.build("vgg16", vgg.Params(), (3, 32, 32), 10).eval()
    apply_masks(model, magnitude_masks(model, 0.99))
    x = torch.rand(4, 3, 32, 32)
    with effective_weights(model):
        results = []
        for network in (folded_view(model, x), model):
            images = x.clone().requires_grad_()
            logits = network(images)
            results.append((logits, *torch.autograd.grad(logits.square().sum(), images)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)
    pooled = sum(isinstance(layer, nn.MaxPool2d) for layer in model.modules())
    assert len(calls) >= pooled == 4
