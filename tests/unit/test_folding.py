"""The folded view gives the results of the network with the weights at one moment."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robsparse import models
from robsparse.base import registry
from robsparse.compute import perturb
from robsparse.fast import backends, folded_layers, folding
from robsparse.schema.threat import Crafting
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.masks import apply_masks, bake, magnitude_masks
from robsparse.training import objectives

SHAPES = {"small_cnn": (1, 8, 8), "small_resnet": (1, 8, 8)}
ARCHS = [
    (name, padding)
    for name in (
        "small_cnn",
        "small_resnet",
        "vgg16",
        "resnet18",
        "resnet50",
        "wrn28_2",
        "preactresnet18",
    )
    for padding in ("symmetric", "tensorflow")
    if padding == "symmetric" or "padding" in registry.entry("arch", name).params.model_fields
]


def build(name, padding="symmetric", **options):
    params = registry.entry("arch", name).params
    if padding != "symmetric":
        options["padding"] = padding
    torch.manual_seed(0)
    model = models.build(name, params(**options), SHAPES.get(name, (3, 32, 32)), 10)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model.eval()


def outputs_and_gradient(model, x):
    x = x.clone().requires_grad_(True)
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


def differences(model, x, dtype=None):
    """Return the relative L2 differences of outputs and of gradients."""
    own = outputs_and_gradient(model, x)
    view = outputs_and_gradient(folding.folded_view(model, x, dtype), x)
    return [float((a - b).norm() / a.norm()) for a, b in zip(own, view, strict=True)]


def largest_difference(model, x):
    return max(differences(model, x))


# In fp32, an input of a ReLU may be rounded to the other side of 0.
@pytest.mark.parametrize(
    ("dtype", "limits"), [(torch.float64, (1e-10, 1e-10)), (torch.float32, (1e-5, 2e-2))]
)
@pytest.mark.parametrize(("name", "padding"), ARCHS)
def test_values_are_those_of_the_network(name, padding, dtype, limits):
    model = build(name, padding).to(dtype)
    x = torch.rand(3, *SHAPES.get(name, (3, 32, 32)), dtype=dtype)
    assert folding.runs_on(folding.folded_view(model, x)) == "view"
    found = differences(model, x)
    assert all(value < limit for value, limit in zip(found, limits, strict=True)), found


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet", "resnet18", "preactresnet18"])
def test_view_supports_silu(name):
    model = build(name, activation="silu").double()
    x = torch.rand(3, *SHAPES.get(name, (3, 32, 32)), dtype=torch.float64)
    assert folding.runs_on(folding.folded_view(model, x)) == "view"
    assert largest_difference(model, x) < 1e-10


@pytest.mark.parametrize(
    ("name", "dtype", "steps"),
    [
        ("small_cnn", torch.float32, 9),
        ("small_resnet", torch.float32, 9),
        ("wrn28_2", torch.float64, 9),
        (
            "wrn28_2",
            torch.float32,
            1,
        ),  # rounding differences of a deep untrained network grow with each step
    ],
)
def test_crafted_images_change_in_the_same_direction(name, dtype, steps):
    model = build(name).to(dtype)
    x = torch.rand(8, *SHAPES.get(name, (3, 32, 32)), dtype=dtype)
    y = torch.arange(8)
    # The number of steps is odd and eps does not limit them, so every pixel changes.
    made = [
        perturb.ascend(m, x, x, perturb.cross_entropy_of(y), eps=0.03, step_size=0.003, steps=steps)
        for m in (model, folding.folded_view(model, x))
    ]
    same = ((made[0] - x).sign() == (made[1] - x).sign()).float().mean()
    assert same > 0.999


def test_normalised_images():
    model = build("resnet18", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).double()
    view = folding.folded_view(model, torch.rand(2, 3, 32, 32, dtype=torch.float64))
    assert folding.runs_on(view) == "view"
    assert largest_difference(model, torch.rand(2, 3, 32, 32, dtype=torch.float64)) < 1e-10


def test_view_follows_weights_statistics_and_masks():
    model = build("small_resnet").double()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    first = folding.folded_view(model, x)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.1)
        model[1].running_mean.add_(0.1)
    assert largest_difference(model, x) < 1e-10
    assert folding.folded_view(model, x).snapshot is not first.snapshot
    assert folding.folded_view(model, x).status.program is first.status.program  # traced once
    apply_masks(model, magnitude_masks(model, 0.5))
    assert largest_difference(model, x) < 1e-10
    bake(model)
    assert largest_difference(model, x) < 1e-10


def test_sparse_weights_stay_exactly_zero_in_the_view():
    model = build("small_cnn")
    apply_masks(model, magnitude_masks(model, 0.9))
    view = folding.folded_view(model, torch.rand(2, 1, 8, 8))
    nonzero = sum(int(m.weight.count_nonzero()) for m in prunable(model).values())
    weights = [layer.affine.weight for layer in view.snapshot.layers]
    assert sum(int(weight.count_nonzero()) for weight in weights) == nonzero


def test_view_does_not_change_the_network():
    model = build("small_cnn")
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    x = torch.rand(2, 1, 8, 8).requires_grad_(True)
    view = folding.folded_view(model, x)
    view(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [name for name, _ in model.named_modules()] == names
    assert not model.training
    assert not list(view.parameters())
    assert len(list(view.modules())) == 1


class Odd(nn.Conv2d):
    """A layer with a custom forward."""

    def forward(self, x):
        return super().forward(x) + 1


class Turning(nn.Module):
    """Python code that depends on the values of the images."""

    def forward(self, x):
        return x.flatten(1)[:, :10] if x.sum() > 0 else -x.flatten(1)[:, :10]


class Loose(nn.Module):
    """A parameter outside a layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * x.flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(Odd(1, 2, 3), nn.Flatten()), "Odd has a custom forward"),
        (Turning(), "it cannot be traced"),
        (Loose(), "it uses the tensor 'scale' outside a layer"),
    ],
)
def test_network_without_a_view_is_used_and_one_line_gives_the_reason(model, message, capsys):
    model.eval()
    x = torch.rand(2, 1, 8, 8)
    assert folding.folded_view(model, x) is model
    assert folding.folded_view(model, x) is model
    [line] = capsys.readouterr().out.splitlines()
    assert message in line


class Shared(nn.Module):
    """Batch norm and ReLU of tensors that are also used by other layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.end = nn.Linear(72, 10)

    def forward(self, x):
        made = self.conv(x)
        both = functional.relu(made) + self.norm(made)
        return self.end((functional.relu(both) - both).flatten(1))


def test_tensors_with_two_uses_are_not_folded_or_overwritten():
    model = Shared().double().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.bias.normal_()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    assert isinstance(folding.folded_view(model, x), folding.View)
    assert largest_difference(model, x) < 1e-12


def test_network_is_used_for_crafting_with_batch_norm_in_train_mode():
    model = build("small_cnn")
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    crafting = Crafting(steps=2, step_size=0.05, bn_mode="train")
    attacker = objectives.Attacker(0.1, crafting, torch.Generator().manual_seed(0))
    before = int(model[1].num_batches_tracked)
    attacker.attack_labels(model, x, y)
    assert int(model[1].num_batches_tracked) == before + 2


# ---------------------------------------------------------------- backends


def test_compiled_view_computes_the_same():
    model, x = build("small_cnn", width=4), torch.rand(4, 1, 8, 8)
    expected = outputs_and_gradient(model, x)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    folding.folded_view(model, x, backend="compiled")  # compile before the weights change again
    with torch.no_grad():
        next(model.parameters()).div_(1.1)
    found = outputs_and_gradient(folding.folded_view(model, x, backend="compiled"), x)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["compiled", "graph"])
def test_backend_that_does_not_start_prints_one_line_and_is_replaced_by_eager(
    backend, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(torch, "compile", refuse)
    model, x = build("small_cnn"), torch.rand(3, 1, 8, 8)
    expected = outputs_and_gradient(folding.folded_view(model, x), x)
    for _ in range(2):
        found = outputs_and_gradient(folding.folded_view(model, x, backend=backend), x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"backend '{backend}' cannot be used (RuntimeError: " in out


def test_out_of_memory_does_not_replace_a_backend(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", full)
    x = torch.rand(1, 1, 8, 8)
    view = folding.folded_view(build("small_cnn"), x, backend="compiled")
    with pytest.raises(torch.OutOfMemoryError):
        view(x)


def test_graph_copies_the_weights_of_its_snapshot(monkeypatch):
    """A captured graph always reads the same memory."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda run, sample: run)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    model, x = build("small_resnet"), torch.rand(2, 1, 8, 8)
    one = folding.folded_view(model, x)
    graph = backends._Graph(one.status.program.run, one.snapshot, x)
    memory = [tensor.data_ptr() for tensor in graph.memory.tensors()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    two = folding.folded_view(model, x)
    for view in (one, two, two, one):
        assert torch.equal(graph(view.snapshot, x), view(x))
    assert [tensor.data_ptr() for tensor in graph.memory.tensors()] == memory
    assert not set(memory) & {tensor.data_ptr() for tensor in one.snapshot.tensors()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_graph_computes_the_same_after_weights_have_changed():
    model, x = build("resnet18").cuda(), torch.rand(8, 3, 32, 32, device="cuda")
    for factor in (1.0, 1.1, 0.9):
        with torch.no_grad():
            next(model.parameters()).mul_(factor)
        expected = outputs_and_gradient(folding.folded_view(model, x), x)
        found = outputs_and_gradient(folding.folded_view(model, x, backend="graph"), x)
        for a, b in zip(expected, found, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


class Plain(nn.Module):
    """Layers without batch norm. Their weights are parameters of the network."""

    def __init__(self):
        super().__init__()
        self.conv, self.end = nn.Conv2d(1, 8, 3), nn.Linear(288, 10)

    def forward(self, x):
        return self.end(self.conv(x).flatten(1))


@pytest.mark.parametrize("make", [lambda: build("small_cnn"), Plain], ids=["folded", "plain"])
@pytest.mark.parametrize("density", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("used_before", [True, False])
def test_a_view_never_changes(make, density, dtype, used_before):
    """New weights of the network and later views do not change it."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < density)
    expected = outputs_and_gradient(folding.folded_view(model, x, dtype), x)
    view = folding.folded_view(model, x, dtype)
    if used_before:
        outputs_and_gradient(view, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    kept = copy.deepcopy(model.state_dict())
    later = outputs_and_gradient(folding.folded_view(model, x, dtype), x)
    found = outputs_and_gradient(view, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(later[0], found[0])
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_agrees_with_torch(bias, affine):
    """The weights are equal. The biases are equal up to rounding (see `folded_parameters`)."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 50, 3, bias=bias)
    norm = nn.BatchNorm2d(50, affine=affine).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    both = layer.double().eval(), norm.double()
    weight, shift = folded_layers.folded_parameters(*both)
    fused = fuse_conv_bn_eval(*both)
    assert torch.equal(weight, fused.weight)
    assert torch.allclose(shift, fused.bias, rtol=1e-13, atol=1e-15)
