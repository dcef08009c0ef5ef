"""Difficult networks: the folded view gives the same results, or it is not used."""

import random

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.eval import clean, pgd
from robsparse.evaluation.runner import attack_model
from robsparse.fast import costs, folded_layers, folding, forms, proof
from robsparse.schema.threat import Crafting
from robsparse.study.planned import Attack
from robsparse.training import objectives

SHAPE = (1, 8, 8)
X, Y = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(6)


class Net(nn.Module):
    """Two layers. A subclass defines the function between them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.end = nn.Linear(192, 10)

    def between(self, x):
        return x

    def forward(self, x):
        return self.end(self.between(self.norm(self.conv(x))).flatten(1))


class Tutorial(Net):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).repeat(1, 4, 1, 1)
        return self.end(x.view(x.size(0), -1))


class Rewritten(Net):
    def between(self, x):
        return self.relu(x) + x  # the ReLU also changes x


class RewrittenThroughView(Net):
    def between(self, x):
        flat = x.flatten(1)
        F.relu_(flat)
        return x


class RewrittenInPeace(Net):
    def between(self, x):
        y = self.relu(x) * 2
        y -= 1
        return F.relu(y, inplace=True)


class BatchStatistics(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)


class Unused(Net):
    def forward(self, x):
        self.relu(self.norm(self.conv(x)))
        return super().forward(x)


class PythonRandom(Net):
    def between(self, x):
        return x * random.random()


class TorchRandom(Net):
    def between(self, x):
        return x + torch.rand(1).item()


class NoisyImages(Net):
    def between(self, x):
        return x + 0.1 * torch.randn_like(x)


class Dropping(Net):
    def between(self, x):
        return F.dropout(x, training=True)


class OwnGenerator(Net):
    def __init__(self):
        super().__init__()
        self.source = random.Random(0)

    def between(self, x):
        return x * self.source.random()


class Counting(Net):
    calls = 0

    def between(self, x):
        self.calls += 1
        return x * self.calls


class Listing(Net):
    def __init__(self):
        super().__init__()
        self.calls = [0]

    def between(self, x):
        self.calls[0] = self.calls[0] + 1
        return x * self.calls[0]


class Remembering(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def between(self, x):
        self.seen += 1
        return x


class Loose(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def between(self, x):
        return x * self.scale


class GradMode(Net):
    def between(self, x):
        return x if torch.is_grad_enabled() else -x


class BatchNormPlus(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class ConvPlus(nn.Conv2d):
    def _conv_forward(self, *given):
        return super()._conv_forward(*given) + 1


class OwnNorm(Net):
    def __init__(self):
        super().__init__()
        self.norm = BatchNormPlus(3)


class OwnConvolution(Net):
    def __init__(self):
        super().__init__()
        self.conv = ConvPlus(1, 3, 3, padding=1)


class Several(Net):
    """Layers that are used twice, and layers of other kinds."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)
        self.group, self.prelu = nn.GroupNorm(3, 3), nn.PReLU()
        self.same = nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect", groups=3)

    def between(self, x):
        x = F.avg_pool2d(self.up(self.prelu(self.same(self.same(x)))), 2)
        return self.norm(self.group(x))


def hooked(register):
    def made():
        net = Net()
        register(net)
        return net

    return made


def overridden():
    net = Net()
    net.relu.forward = lambda x: x - 1
    net.between = net.relu
    return net


def normalised(norm):
    def made():
        net = Net()
        norm(net.conv)
        return net

    return made


VIEWED = [
    Tutorial,
    RewrittenInPeace,
    BatchStatistics,
    Unused,
    Several,
    normalised(nn.utils.parametrizations.weight_norm),
    normalised(nn.utils.parametrizations.spectral_norm),
]
AS_IT_IS = {
    "changes a tensor in place": [Rewritten, RewrittenThroughView],
    "draws random numbers": [PythonRandom, TorchRandom, Dropping, NoisyImages],
    "changes its attributes": [Counting, Listing],
    "its passes over the same images differ": [OwnGenerator, GradMode],
    "outside a layer": [Loose],
    "changes its buffers": [Remembering],
    "has a custom forward": [OwnNorm, OwnConvolution, overridden],
    "has hooks": [
        hooked(lambda net: net.norm.register_forward_hook(lambda module, x, y: y + 1)),
        hooked(lambda net: net.register_forward_pre_hook(lambda module, x: (x[0] / 2,))),
        hooked(lambda net: net.norm.register_full_backward_hook(lambda module, x, y: (x[0] * 2,))),
        normalised(nn.utils.weight_norm),
    ],
}


def build(make):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def seed():
    torch.manual_seed(1)
    random.seed(1)


def agree(one, other, x):
    """Return whether both give the same outputs and input gradients with the same seed."""
    found = []
    for run in (one, other):
        seed()
        found.append(proof.passes(run, x, gradient=True))
    return not proof.difference(*found)


def crafted(model, monkeypatch, x=X, *, viewed=True):
    """Return adversarial images of a training step, from the view or from the network."""
    with monkeypatch.context() as patch:
        if not viewed:
            patch.setattr(folding, "folded_view", lambda model, *_: model)
        attacker = objectives.Attacker(
            0.1, Crafting(steps=3, step_size=0.03), torch.Generator().manual_seed(0)
        )
        seed()
        return attacker.attack_labels(model.train(), x, Y[: len(x)])


@pytest.mark.parametrize("make", VIEWED)
def test_view_gives_the_results_of_the_network(make, monkeypatch, capsys):
    model, x = build(make).double(), X.double()
    view = folding.folded_view(model, x)
    assert folding.runs_on(view) == "view"
    for images in (x, x[:1], x.contiguous(memory_format=torch.channels_last)):
        assert agree(model, view, images)
    own = crafted(model, monkeypatch, x, viewed=False)
    assert torch.allclose(crafted(model, monkeypatch, x), own, atol=1e-9)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "reason"), [(make, message) for message, made in AS_IT_IS.items() for make in made]
)
def test_network_without_a_view_is_used_for_crafting(make, reason, monkeypatch, capsys):
    own = crafted(build(make), monkeypatch, viewed=False)
    model = build(make)
    for _ in range(2):
        found = crafted(model, monkeypatch)
    line = capsys.readouterr().out
    assert line.count("\n") == 1  # once, not at every step
    assert reason in line
    assert folding.runs_on(folding.folded_view(model.eval(), X)) == "network"
    if reason not in ("changes its attributes", "its passes over the same images differ"):
        assert torch.equal(found, own)


@pytest.mark.parametrize(
    ("make", "used"), [(Tutorial, "view"), (Rewritten, "network"), (Dropping, "network")]
)
def test_attack_has_the_same_result_and_records_what_it_used(make, used):
    model = build(make)
    attacks = [
        Attack("clean", "clean", clean.Params(), "Linf", 0.0),
        Attack("pgd", "pgd", pgd.Params(steps=3, restarts=1), "Linf", 0.02),
    ]
    seed()
    part = Part(X, model(X).argmax(1))
    found = []
    for folded in (True, False):
        seed()
        results = attack_model(
            model,
            part,
            attacks,
            seed=0,
            batch_size=4,
            device=torch.device("cpu"),
            folded=folded,
        )
        assert {r.attacked_on for r in results} == {used if folded else "network"}
        found.append([r.robust["all"].tolist() for r in results])
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [Counting, Listing, Remembering, Dropping, PythonRandom, Net])
def test_comparison_does_not_change_the_network_and_random_numbers(make):
    model = build(make)
    seed()
    expected = model(X), random.random(), torch.rand(1)
    model = build(make)
    names = set(vars(model))
    seed()
    folding.folded_view(model, X)
    assert set(vars(model)) == names
    found = model(X), random.random(), torch.rand(1)
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- later changes of the network


def swap_layer(model):
    model.conv = nn.Conv2d(1, 3, 3, padding=1).eval()


def swap_norm(model):
    model.norm = nn.BatchNorm2d(3, eps=0.5).eval()


def other_stride(model):
    model.conv.stride, model.conv.padding = (2, 2), (5, 5)


def override(model):
    model.norm.forward = lambda x: x * 3


def add_hook(model):
    model.conv.register_forward_hook(lambda module, x, y: y * 2)


def other_mode(model):
    model.between = F.tanh


@pytest.mark.parametrize(
    "change", [swap_layer, swap_norm, other_stride, override, add_hook, other_mode]
)
def test_view_follows_a_change_of_structure(change):
    model = build(Net)
    assert agree(model, folding.folded_view(model, X), X)
    before = model(X)
    change(model)
    assert not torch.allclose(model(X), before)
    assert agree(model, folding.folded_view(model, X), X)


def test_a_hook_that_only_reads_leaves_the_view():
    model, read = build(Net), []

    def keep(module, x, y):
        read.append(y)

    keep.only_reads = True
    model.register_forward_hook(keep)
    view = folding.folded_view(model, X)
    assert folding.runs_on(view) == "view"
    read.clear()
    view(X)
    assert not read
    model(X)
    assert len(read) == 1
    add_hook(model)
    assert folding.folded_view(model, X) is model


def test_hook_on_all_modules_is_noticed():
    model = build(Net)
    assert folding.runs_on(folding.folded_view(model, X)) == "view"
    handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: y + 1)
    try:
        assert folding.folded_view(model, X) is model
    finally:
        handle.remove()
    assert folding.runs_on(folding.folded_view(model, X)) == "view"


def test_network_in_train_mode_has_no_view(capsys):
    model = build(Net)
    model.norm.train()
    assert folding.folded_view(model, X) is model
    assert "'norm' is in train mode" in capsys.readouterr().out
    assert folding.runs_on(folding.folded_view(model.eval(), X)) == "view"


# ---------------------------------------------------------------- the comparison


def shifted(forward):
    return lambda self, x: forward(self, x) + 1e-3


def steeper(forward):
    def twice(self, x):
        out = forward(self, x)
        return 2 * out - out.detach()

    return twice


@pytest.mark.parametrize(
    ("wrong", "message"), [(shifted, "outputs differ by"), (steeper, "gradients differ by")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_view_with_other_results_is_not_used(wrong, message, dtype, monkeypatch, capsys):
    linear = folded_layers.FoldedLinear
    monkeypatch.setattr(linear, "__call__", wrong(linear.__call__))
    model, x = build(Net).to(dtype), X.to(dtype)
    assert folding.folded_view(model, x) is model
    assert message in capsys.readouterr().out


def test_images_of_another_shape_and_type_are_compared_too(monkeypatch):
    compared = []
    monkeypatch.setattr(
        proof,
        "passes",
        lambda run, x, passes=proof.passes, **given: compared.append(x) or passes(run, x, **given),
    )
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    sizes = []
    for side in (8, 8, 12, 8, 12):
        compared.clear()
        folding.folded_view(model, torch.rand(20, 1, side, side))
        sizes.append({tuple(x.shape) for x in compared})
    assert sizes[0] >= {(8, 1, 8, 8)}
    assert sizes[2] >= {(8, 1, 12, 12)}
    assert sizes[1] == sizes[3] == sizes[4] == set()


def test_form_that_differs_from_its_convolution_is_not_used(monkeypatch, capsys):
    """Later weights are sparser, so another form is chosen. It was not compared before."""
    kinds = iter(["channels_last"] * 20 + ["matrix"] * 20)
    monkeypatch.setattr(costs, "choose", lambda given, _: [next(kinds)] * len(given))
    output = forms.MatrixForm.output
    monkeypatch.setattr(
        forms.MatrixForm,
        "output",
        lambda self, *given, **named: output(self, *given, **named) * 1.01,
    )
    model = build(Net)
    assert folding.runs_on(folding.folded_view(model, X)) == "view"
    for kind in kinds:
        if kind == "matrix":
            break
    view = folding.folded_view(model, X)
    assert torch.equal(view(X), model(X))
    assert folding.runs_on(view) == "network"
    assert "the matrix form of Conv2d" in capsys.readouterr().out
    assert folding.folded_view(model, X) is model


def test_view_that_fails_on_valid_images_is_replaced_and_prints_one_line(capsys):
    model = build(Net)
    view = folding.folded_view(model, X)

    def fail(snapshot, x):
        raise IndexError("no\nsuch batch")

    view.backend.eager = fail
    for _ in range(2):
        assert torch.equal(view(X[:3]), model(X[:3]))
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "it fails (IndexError: no such batch)" in line
    assert folding.runs_on(view) == "network"
    assert folding.folded_view(model, X) is model


def test_an_error_of_the_network_is_raised_and_the_view_is_kept(capsys):
    model = build(Net)
    view = folding.folded_view(model, X)
    with pytest.raises(RuntimeError, match="channels"):
        view(torch.rand(2, 5, 8, 8))
    assert folding.runs_on(view) == "view"
    assert not capsys.readouterr().out


def test_out_of_memory_does_not_replace_the_view():
    model = build(Net)
    view = folding.folded_view(model, X)

    def full(snapshot, x):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    view.backend.eager = full
    with pytest.raises(RuntimeError, match="allocate memory"):
        view(X)
    assert folding.runs_on(view) == "view"


def test_backend_with_other_results_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda eager, **_: lambda *given: eager(*given) * 1.01)
    model = build(Net)
    expected = folding.folded_view(model, X)(X)
    assert torch.equal(folding.folded_view(model, X, backend="compiled")(X), expected)
    assert "its results differ: outputs differ" in capsys.readouterr().out


def test_backend_starts_once_for_each_precision_and_follows_the_weights(monkeypatch):
    """bf16 in crafting, fp32 between."""
    started = []
    monkeypatch.setattr(torch, "compile", lambda eager, **_: started.append(1) or eager)
    model = build(Net)
    for dtype, times in ((None, 1), (None, 1), (torch.bfloat16, 2), (None, 2), (torch.bfloat16, 2)):
        with torch.no_grad():
            model.conv.weight.mul_(1.1)
        found = folding.folded_view(model, X, dtype, backend="compiled")(X)
        assert len(started) == times
        expected = folding.folded_view(model, X, dtype)(X)
        assert torch.allclose(found, expected, atol=2e-2 if dtype else 1e-6)


# ---------------------------------------------------------------- random architectures


class Block(nn.Module):
    """A convolution and following layers, and optionally a residual connection."""

    def __init__(self, channels, options, norm, act, residual):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, **options)
        self.norm, self.act, self.residual = norm(channels), act, residual

    def forward(self, x):
        out = self.norm(self.conv(x))
        if self.residual == "in place":
            out += x
        return self.act(out + x if self.residual == "sum" else out)


class Randomly(nn.Module):
    def __init__(self, blocks, flatten):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(1, 4, 3), *blocks)
        self.flatten, self.end = flatten, nn.LazyLinear(5)

    def forward(self, x):
        return self.end(self.flatten(self.blocks(x)))


@st.composite
def networks(draw):
    norms = {
        "none": lambda channels: nn.Identity(),
        "batch": nn.BatchNorm2d,
        "plain": lambda channels: nn.BatchNorm2d(channels, affine=False),
        "of the batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
        "group": lambda channels: nn.GroupNorm(2, channels),
    }
    acts = [
        nn.Identity,
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: nn.LeakyReLU(inplace=True),
        lambda: nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True)),
        nn.Hardtanh,
    ]
    flattens = [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, x.size(1) * x.size(2) * x.size(3)),
        lambda x: x.flatten(1),
        lambda x: torch.flatten(F.relu(x, inplace=True), 1),
        lambda x: x.mean((2, 3)),
        lambda x: F.adaptive_avg_pool2d(x, 2).reshape(x.shape[0], 16),
    ]
    blocks = []
    for _ in range(draw(st.integers(0, 3))):
        dilation = draw(st.integers(1, 2))
        options = {
            "padding": dilation,
            "dilation": dilation,
            "groups": draw(st.sampled_from([1, 2])),
            "bias": draw(st.booleans()),
            "padding_mode": draw(st.sampled_from(["zeros", "zeros", "circular"])),
        }
        norm = norms[draw(st.sampled_from(list(norms)))]
        residual = draw(st.sampled_from(["", "sum", "in place"]))
        blocks.append(Block(4, options, norm, draw(st.sampled_from(acts))(), residual))
    model = Randomly(blocks, draw(st.sampled_from(flattens))).double().eval()
    model(torch.rand(1, *SHAPE, dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    if draw(st.booleans()):
        for parameter in model.parameters():
            parameter.data.mul_(torch.rand_like(parameter) < 0.2)
    if draw(st.integers(0, 5)) == 0:
        inner = draw(st.sampled_from(list(model.modules())))
        inner.register_forward_hook(lambda module, x, y: y * 1.5)
    return model


@given(model=networks(), count=st.integers(1, 3), last=st.booleans())
def test_random_networks(model, count, last):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.rand(count, *SHAPE, dtype=torch.float64).contiguous(memory_format=layout)
    try:
        proof.passes(model, x, gradient=True)
    except RuntimeError:  # its gradient needs a tensor that it changes in place
        assume(False)
    view = folding.folded_view(model, x)
    assert agree(model, view, x)
    kept = x.clone()
    with torch.no_grad():
        assert torch.allclose(view(x), model(x.clone()), atol=1e-9)
    assert torch.equal(x, kept)
    y = torch.zeros(count, dtype=torch.int64)
    made = [
        perturb.ascend(
            m, x, x, perturb.cross_entropy_of(y), eps=0.1, step_size=0.03, steps=3, norm="L2"
        )
        for m in (view, model)
    ]
    assert torch.allclose(*made, atol=1e-6)
