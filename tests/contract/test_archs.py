"""Every registered architecture can be built for any data set, or an error gives the reason.

Shapes are tried on torch's meta device, where networks have no numbers and cost nothing.
"""

import copy

import pytest
import torch
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.sparsity.layers import prunable, weight_count

ARCHS = registry.names("arch")
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 33, 20), (3, 40, 24), (3, 64, 64)]
CASES = [(shape, 10) for shape in SHAPES] + [((3, 32, 32), 2), ((3, 32, 32), 100)]
TOO_SMALL = [(1, 1, 1), (3, 2, 2), (1, 4, 4), (1, 32, 1)]


@pytest.fixture(scope="module", params=ARCHS)
def arch(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(arch) -> nn.Module:
    """Build each architecture once, in eval mode. Tests do not change it."""
    return build(arch).eval()


def build(name, shape=(3, 32, 32), classes=10, seed=0, device="cpu", **params) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device(device):
        return models.build(name, registry.entry("arch", name).params(**params), shape, classes)


def images(n) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits_shape(model, shape) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(model.eval()(torch.rand(3, *shape, device="meta")).shape)


@pytest.mark.parametrize(("shape", "classes"), CASES)
def test_logits_have_one_column_for_each_class(arch, shape, classes):
    try:
        model = build(arch, shape, classes, device="meta")
    except UsageError as error:
        assert shape != (3, 32, 32), f"{arch} must build for images of 3x32x32"
        pytest.skip(str(error))
    assert logits_shape(model, shape) == (3, classes)


@pytest.mark.parametrize("shape", TOO_SMALL)
def test_images_that_are_too_small_are_refused_in_one_line_or_work(arch, shape):
    try:
        model, refusal = build(arch, shape, device="meta"), ""
    except UsageError as error:
        model, refusal = None, str(error)
    if model is None:
        assert f"{shape[1]}x{shape[2]}" in refusal
        assert "\n" not in refusal
    else:
        assert logits_shape(model, shape) == (3, 10)


def test_small_cnn_refuses_images_below_five_pixels():
    with pytest.raises(UsageError, match="at least 5x5 pixels, found 4x4"):
        build("small_cnn", (1, 4, 4))
    build("small_cnn", (1, 5, 5))


def test_eval_mode_is_deterministic_and_independent_of_the_batch(network):
    x = images(2)
    with torch.no_grad():
        together, again = network(x), network(x)
        alone = torch.cat([network(image[None]) for image in x])
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    assert torch.equal(together, again)
    scale = float(together.abs().max())
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4 * scale)
    assert float((together[0] - together[1]).abs().max()) > 1e-3 * scale


def test_same_torch_seed_gives_the_same_weights(arch, network):
    one, same = network.state_dict(), build(arch, seed=0).state_dict()
    assert one.keys() == same.keys()
    assert all(torch.equal(one[key], value) for key, value in same.items())


def test_another_torch_seed_gives_other_weights(arch, network):
    other = prunable(build(arch, seed=1))
    for name, module in prunable(network).items():
        assert not torch.equal(module.weight, other[name].weight)


def test_every_weight_matrix_and_kernel_is_prunable(network):
    matrices = {key: value for key, value in network.named_parameters() if value.ndim > 1}
    assert [f"{key}.weight" for key in prunable(network)] == list(matrices)
    assert weight_count(network) == sum(value.numel() for value in matrices.values())


def test_no_layer_starts_at_zero_and_each_gets_a_gradient(network):
    model = copy.deepcopy(network).train()
    nn.functional.cross_entropy(model(images(2)), torch.arange(2)).backward()
    for module in prunable(model).values():
        # Random float32 numbers: about one in 2**24 is exactly 0.
        zeros = int((module.weight == 0).sum())
        assert zeros <= 1 + module.weight.numel() // 2**18
        assert module.weight.grad.abs().sum() > 0


def test_normalisation_is_the_first_layer_and_has_the_channels_of_the_images(arch):
    params = registry.entry("arch", arch).params
    if "mean" not in params.model_fields:
        pytest.skip("does not normalise")
    for channels in (1, 3):
        shape, values = (channels, 32, 32), [0.5] * channels
        model = build(arch, shape, device="meta", mean=values, std=values)
        first = next(module for module in model.modules() if not list(module.children()))
        assert {name: tuple(value.shape) for name, value in first.named_buffers()} == {
            "mean": (channels,),
            "std": (channels,),
        }
        assert logits_shape(model, shape) == (3, 10)
        assert prunable(model).keys() == prunable(build(arch, shape, device="meta")).keys()
        with pytest.raises(UsageError, match=rf"\({channels}\), found 2") as caught:
            build(arch, shape, device="meta", mean=[0.5, 0.5], std=[0.5, 0.5])
        assert "\n" not in str(caught.value)
