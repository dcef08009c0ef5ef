"""`robsparse.load`: the network of a compact file in use."""

import copy
import pickle

import pytest
import torch
from torch import nn

import robsparse
from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.fast import folding
from robsparse.networks import compact
from robsparse.sparsity.layers import prunable

SHAPE = (3, 16, 16)


@pytest.fixture
def written(tmp_path):
    """A sparse network with normalised images, and its compact file."""
    params = {"width": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    settings = registry.entry("arch", "small_resnet").params(**params)
    network = models.build("small_resnet", settings, SHAPE, 10)
    network(torch.rand(32, *SHAPE))
    with torch.no_grad():
        for layer in prunable(network).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    path = tmp_path / "one.safetensors"
    described = {"dataset": "cifar10", "image_shape": SHAPE, "classes": 10, "provenance": {}}
    described |= {"arch": "small_resnet", "arch_params": params}
    compact.write(path, network.state_dict(), **described)
    return network.eval(), path


def close(one, other):
    return bool((one - other).abs().max() < 1e-5 * other.abs().max())


def test_three_lines_give_the_logits_of_the_network(written):
    network, path = written
    images = torch.rand(5, *SHAPE)
    assert close(robsparse.load(path)(images), network(images))


@pytest.mark.parametrize("n", [1, 2, 33])
def test_it_runs_on_the_folded_view_for_every_batch(written, n, monkeypatch):
    network, path = written
    loaded = robsparse.load(str(path))
    images = torch.rand(n, *SHAPE)
    assert close(loaded(images), network(images))
    assert folding.runs_on(loaded._view_for(images)) == "view"
    monkeypatch.setattr(loaded.network, "forward", None)  # a pass of the network would fail now
    assert loaded(images).shape == (n, 10)


def test_no_images_give_no_logits(written):
    _, path = written
    assert robsparse.load(path)(torch.rand(0, *SHAPE)).shape == (0, 10)


def test_view_is_made_once_and_again_when_weights_change(written):
    network, path = written
    loaded, images = robsparse.load(path), torch.rand(3, *SHAPE)
    first = loaded._view_for(images)
    assert loaded._view_for(torch.rand(7, *SHAPE)) is first
    for model in (loaded.network, network):
        with torch.no_grad():
            model.classifier.weight.mul_(2)
    assert loaded._view_for(images) is not first
    assert close(loaded(images), network(images))
    loaded, network = loaded.double(), network.double()
    assert close(loaded(images.double()), network(images.double()))


def test_images_have_a_gradient_and_weights_have_none(written):
    network, path = written
    loaded = robsparse.load(path)
    gradients, pixels = [], torch.rand(2, *SHAPE)
    for model in (loaded, network):
        images = pixels.clone().requires_grad_(True)
        model(images)[:, 0].sum().backward()
        gradients.append(images.grad)
    assert close(*gradients)
    assert gradients[0].norm() > 0
    assert all(p.grad is None and not p.requires_grad for p in loaded.parameters())


def test_gradient_after_a_first_call_in_inference_mode(written):
    network, path = written
    loaded, images = robsparse.load(path), torch.rand(2, *SHAPE)
    with torch.inference_mode():
        for n in (1, 2, 64):  # small and large batches may have different kernels
            pixels = torch.rand(n, *SHAPE)
            assert close(loaded(pixels), network(pixels))
    loaded(images.requires_grad_(True)).sum().backward()
    assert images.grad is not None
    assert folding.runs_on(loaded._view_for(images)) == "view"
    with torch.no_grad():
        assert close(loaded(images), network(images))


def test_it_stays_in_eval_mode(written):
    _, path = written
    loaded = robsparse.load(path)
    assert loaded.train() is loaded
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_is_a_network_of_its_own(written, copied):
    network, path = written
    loaded, images = robsparse.load(path), torch.rand(3, *SHAPE)
    loaded(images)
    other = copied(loaded)
    nn.init.zeros_(loaded.network.classifier.weight)
    assert close(other(images), network(images))


@pytest.mark.parametrize(
    "images", [torch.rand(2, 1, 16, 16), torch.rand(3, 16, 16), torch.ones(2, *SHAPE).byte()]
)
def test_other_images_are_refused_in_one_line(written, images):
    _, path = written
    with pytest.raises(UsageError, match=r"expected numbers in \[0,1\] of shape \(N, 3, 16, 16\)"):
        robsparse.load(path)(images)


def test_description_says_what_the_network_is(written):
    _, path = written
    description = robsparse.load(path).description
    assert (description.arch, description.dataset) == ("small_resnet", "cifar10")
    assert description.arch_params["mean"] == [0.5, 0.4, 0.3]
