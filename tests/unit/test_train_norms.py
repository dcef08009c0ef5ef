"""Batch norm of the sparse training pass, with the sum and the ReLU after it, against torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robsparse.fast.sparse_pass import sparse_pass
from robsparse.fast.tracing import rectified_norms
from robsparse.kernels.library import library
from robsparse.kernels.norms import BatchNorm
from robsparse.models import small
from robsparse.sparsity.masks import apply_masks, effective_weights, magnitude_masks

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    """Convolution, batch norm, and what `after` does with the results of both."""

    def __init__(self, after, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **options)
        self.relu, self.after = nn.ReLU(), after

    def forward(self, x):
        x = self.conv(x)
        return self.after(self, x, self.norm(x))


def in_place(block, x, y):
    y += x
    return F.relu(y, inplace=True)


def used_twice(block, x, y):
    return y + torch.relu(y)


def kept(block, x, y):
    block.last = y
    return torch.relu(y)


def drawn(block, x, y):
    return torch.relu(y) if torch.rand(()) < 2 else y


def norm_twice(block, x, y):
    return torch.relu(y) + block.norm(x)


# what follows: what the kernels compute with batch norm, in the order of the calls
AFTER = {
    "nothing": (lambda block, x, y: y, [""]),
    "relu": (lambda block, x, y: block.relu(y), ["relu"]),
    "relu of an argument with a name": (lambda block, x, y: F.relu(input=y), ["relu"]),
    "sum and relu": (lambda block, x, y: torch.relu(x + y), ["sum, relu"]),
    "sum in place": (in_place, ["sum, relu"]),
    "sum of another shape": (lambda block, x, y: torch.relu(y + x[:, :, :1]), [""]),
    "sum with a factor": (lambda block, x, y: torch.relu(torch.add(y, x, alpha=2)), [""]),
    "sum alone": (lambda block, x, y: x + y, [""]),
    "another activation": (lambda block, x, y: F.silu(y), [""]),
    "two uses": (used_twice, [""]),
    "stored": (kept, [""]),
    "random": (drawn, [""]),
    "norm twice": (norm_twice, ["", ""]),
}


@pytest.fixture
def fused(monkeypatch):
    """What the kernels compute with each batch norm."""
    found, output = [], BatchNorm.output

    def noted(self, x_NCHW, other=None, *, rectified=False):
        found.append(("sum, " if other is not None else "") + ("relu" if rectified else ""))
        return output(self, x_NCHW, other, rectified=rectified)

    monkeypatch.setattr(BatchNorm, "output", noted)
    return found


def one_pass(model, *, sparse):
    """Return the output, all gradients and all buffers after a pass."""
    model.zero_grad()
    x = X.clone().requires_grad_()
    with effective_weights(model):
        if sparse:
            with sparse_pass(model, x, torch.float32, {}):
                y = model(x)
        else:
            y = model(x)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same_pass(make):
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = make().double().train()
        apply_masks(model, magnitude_masks(model, 0.5))
        results.append(one_pass(model, sparse=sparse))
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", AFTER)
def test_results_gradients_and_statistics_are_those_of_torch(name, fused):
    after, expected = AFTER[name]
    assert_same_pass(lambda: Block(after))
    assert fused == expected


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1}],
    ids=str,
)
def test_options_of_batch_norm_have_their_effect(options, fused):
    assert_same_pass(lambda: Block(lambda block, x, y: torch.relu(y), **options))
    assert fused == ["" if "track_running_stats" in options else "relu"]


def test_residual_network_has_a_sum_in_each_block(fused):
    def build():
        return small.build("small_resnet", small.Params(width=4), (3, 8, 8), 4)

    assert rectified_norms(build()) == {
        "bn1": False, "stage1.bn1": False, "stage1.bn2": True, "stage2.bn1": False,
        "stage2.bn2": True, "stage2.shortcut.1": True, "stage3.bn1": False, "stage3.bn2": True,
        "stage3.shortcut.1": True,
    }  # fmt: skip
    assert_same_pass(build)
    # A sum has one batch norm that is computed with it. That of the shortcut comes first.
    assert fused == ["relu", "relu", "sum, relu", *["relu", "", "sum, relu"] * 2]


def test_hook_of_a_layer_gets_the_result_of_the_layer(fused):
    seen = []

    def build():
        block = Block(lambda block, x, y: torch.relu(y))
        block.norm.register_forward_hook(lambda module, given, result: seen.append(result.detach()))
        return block

    assert_same_pass(build)
    assert fused == [""]
    torch.testing.assert_close(seen[-2], seen[-1])
    assert (seen[-2] < 0).any()


def test_batch_norm_in_eval_mode_is_that_of_torch(fused):
    def build():
        model = Block(lambda block, x, y: torch.relu(y))
        model.norm.register_forward_pre_hook(lambda norm, given: norm.eval() and None)
        return model

    assert_same_pass(build)
    assert fused == []


def test_call_of_a_part_of_the_network_is_an_error_and_not_a_wrong_result():
    model = small.build("small_resnet", small.Params(width=4), (3, 8, 8), 4).double().train()
    apply_masks(model, magnitude_masks(model, 0.5))
    refused = pytest.raises(RuntimeError, match="only a part of the network")
    with effective_weights(model), refused, sparse_pass(model, X, torch.float32, {}):
        model.bn1(model.conv1(X))


def test_one_number_in_a_channel_has_the_error_of_torch():
    model = Block(lambda block, x, y: torch.relu(y)).double().train()
    apply_masks(model, magnitude_masks(model, 0.5))
    refused = pytest.raises(ValueError, match="more than 1 value per channel")
    with effective_weights(model), sparse_pass(model, X[:1, :, :1, :1], torch.float32, {}), refused:
        model(X[:1, :, :1, :1])
