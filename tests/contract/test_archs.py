"""Every registered architecture builds for any data set or says why it does not."""

import pytest
import torch
from torch import nn

from robsparse import models, registry
from robsparse.errors import UsageError
from robsparse.sparsity import prunable, weight_count

ARCHS = registry.names("arch")
SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 33, 20)]
TOO_SMALL = [(1, 1, 1), (3, 2, 2), (1, 4, 4), (1, 32, 1)]


def build(name, shape=(3, 32, 32), classes=10, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, registry.entry("arch", name).params(), shape, classes)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ARCHS)
def test_logits_have_one_column_a_class(name, shape, classes):
    try:
        model = build(name, shape, classes).eval()
    except UsageError as error:
        assert shape != (3, 32, 32), f"{name} must build for images of 3x32x32"
        pytest.skip(str(error))
    with torch.no_grad():
        logits = model(torch.rand(3, *shape))
    assert logits.shape == (3, classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("shape", TOO_SMALL)
@pytest.mark.parametrize("name", ARCHS)
def test_images_that_are_too_small_are_refused_in_one_line_or_work(name, shape):
    try:
        model, refusal = build(name, shape).eval(), ""
    except UsageError as error:
        model, refusal = None, str(error)
    if model is None:
        assert f"{shape[1]}x{shape[2]}" in refusal
        assert "\n" not in refusal
    else:
        with torch.no_grad():
            assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_small_cnn_refuses_images_below_five_pixels():
    with pytest.raises(UsageError, match="at least 5x5 pixels, found 4x4"):
        build("small_cnn", (1, 4, 4))
    build("small_cnn", (1, 5, 5))


@pytest.mark.parametrize("name", ARCHS)
def test_eval_mode_is_deterministic_and_independent_of_the_batch(name):
    model, x = build(name).eval(), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        together, again = model(x), model(x)
        alone = torch.cat([model(image[None]) for image in x])
    assert torch.equal(together, again)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHS)
def test_same_torch_seed_gives_the_same_weights(name):
    one, same, other = (build(name, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], value) for key, value in same.items())
    assert any(not torch.equal(one[key], value) for key, value in other.items())


@pytest.mark.parametrize("name", ARCHS)
def test_every_weight_matrix_and_kernel_is_prunable(name):
    model = build(name)
    matrices = {key for key, value in model.named_parameters() if value.ndim > 1}
    assert {f"{key}.weight" for key in prunable(model)} == matrices
    assert weight_count(model) == sum(
        dict(model.named_parameters())[key].numel() for key in matrices
    )


@pytest.mark.parametrize("name", ARCHS)
def test_no_weight_is_zero_at_the_start_and_each_gets_a_gradient(name):
    model = build(name)
    nn.functional.cross_entropy(model(torch.rand(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    for module in prunable(model).values():
        assert module.weight.count_nonzero() == module.weight.numel()
        assert module.weight.grad.abs().sum() > 0
