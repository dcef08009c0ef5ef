"""The paper's architectures against numbers known by hand, and what all networks are made of.

Most tests build on torch's meta device: shapes and names without numbers, at no cost.
"""

import csv
import hashlib
import itertools
from pathlib import Path

import pytest
import torch
import torch.fx
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.models import _layers, preactresnet, resnet, vgg, wideresnet
from robsparse.networks import weights
from robsparse.sparsity.layers import prunable, weight_count

BIG = [*resnet.NAMES, *vgg.NAMES, *wideresnet.NAMES]
PADDED = [*resnet.NAMES, *wideresnet.NAMES, *preactresnet.NAMES]
ACTIVATED = [*PADDED, "small_cnn", "small_resnet"]
CIFAR = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}


def build(name, shape=(3, 32, 32), classes=10, device="meta", **params):
    with torch.device(device):
        return models.build(name, registry.entry("arch", name).params(**params), shape, classes)


def outputs(model, shape, kind=nn.Module):
    """Output shape, batch left out, of each module of a kind, in the order they are called."""
    found = {}

    def listen(name):
        def note(module, inputs, output):
            found[name] = tuple(output.shape[1:])

        return note

    for name, module in model.named_modules():
        if name and isinstance(module, kind):
            module.register_forward_hook(listen(name))
    with torch.no_grad():
        model.eval()(torch.rand(1, *shape, device=next(model.parameters()).device))
    return found


# ---------------------------------------------------------------- sizes, names, order


def counts():
    with (Path(__file__).parent / "arch_counts.csv").open() as handle:
        return [
            (row["arch"], int(row["num_classes"]), int(row["rewirable_weights"]))
            for row in csv.DictReader(handle)
        ]


@pytest.mark.parametrize(("name", "classes", "expected"), counts())
def test_weights_are_as_many_as_in_the_authors_networks(name, classes, expected):
    assert weight_count(build(name, classes=classes)) == expected


def test_table_of_counts_has_every_big_network():
    assert {(name, classes) for name, classes, _ in counts()} == {
        (name, classes) for name in BIG for classes in (10, 100)
    }


FIRST_PARTS = {
    "vgg16": [*(f"conv{number}" for number in range(1, 14)), "fc14", "fc15", "fc16"],
    **{
        name: ["conv1", "stage1", "stage2", "stage3", "stage4", "classifier"]
        for name in resnet.NAMES
    },
    **{name: ["conv1", "block1", "block2", "block3", "classifier"] for name in wideresnet.NAMES},
}


@pytest.mark.parametrize("params", [{}, CIFAR])
@pytest.mark.parametrize("name", BIG)
def test_names_of_prunable_layers_start_with_the_part_of_the_network(name, params):
    parts = [key.split(".")[0] for key in prunable(build(name, **params))]
    assert list(dict.fromkeys(parts)) == FIRST_PARTS[name]


@pytest.mark.parametrize("name", registry.names("arch"))
def test_layers_are_defined_in_the_order_they_are_used(name):
    model = build(name)
    assert list(outputs(model, (3, 32, 32), nn.Conv2d | nn.Linear)) == list(prunable(model))


@pytest.mark.parametrize("name", resnet.NAMES)
def test_depth_of_a_resnet_counts_layers_outside_shortcuts(name):
    layers = [key for key in prunable(build(name)) if "shortcut" not in key]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize("name", wideresnet.NAMES)
def test_depth_of_a_wide_resnet_counts_its_convolutions(name):
    convolutions = [key for key in prunable(build(name)) if key != "classifier"]
    assert len(convolutions) == int(name[3:5])
    assert len([key for key in convolutions if "shortcut" in key]) == 3


@pytest.mark.parametrize("name", BIG)
def test_convolutions_have_no_bias_and_linear_layers_have_one(name):
    for module in build(name).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert (module.bias is None) == isinstance(module, nn.Conv2d)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.momentum, module.eps, module.affine) == (0.1, 1e-5, True)


# ---------------------------------------------------------------- maps

SIDES = {
    (3, 32, 32): [(32, 32), (16, 16), (8, 8), (4, 4)],
    (1, 28, 28): [(28, 28), (14, 14), (7, 7), (4, 4)],
    (3, 33, 20): [(33, 20), (17, 10), (9, 5), (5, 3)],
    (3, 8, 8): [(8, 8), (4, 4), (2, 2), (1, 1)],
}


@pytest.mark.parametrize("padding", ["symmetric", "tensorflow"])
@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize(
    ("name", "expansion"),
    [("resnet18", 1), ("resnet34", 1), ("resnet50", 4), ("preactresnet18", 1)],
)
def test_stages_of_a_resnet_halve_the_map_three_times(name, expansion, shape, padding):
    found = outputs(build(name, shape, padding=padding), shape)
    assert [found["conv1"], *(found[f"stage{number}"] for number in (1, 2, 3, 4))] == [
        (width, *sides)
        for width, sides in zip(
            [64, *(expansion * width for width in (64, 128, 256, 512))],
            [SIDES[shape][0], *SIDES[shape]],
            strict=True,
        )
    ]
    assert found["pool"] == (512 * expansion, 1, 1)


@pytest.mark.parametrize("padding", ["symmetric", "tensorflow"])
@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize("name", wideresnet.NAMES)
def test_blocks_of_a_wide_resnet_halve_the_map_twice(name, shape, padding):
    found, factor = outputs(build(name, shape, padding=padding), shape), int(name.split("_")[1])
    assert found["conv1"] == (16, *shape[1:])
    for number, sides in enumerate(SIDES[shape][:3]):
        assert found[f"block{number + 1}"] == (16 * 2**number * factor, *sides)
    assert found["pool"] == (64 * factor, 1, 1)


def test_vgg_pools_four_times_and_feeds_2048_features_to_the_first_linear_layer():
    found = outputs(build("vgg16"), (3, 32, 32))
    assert [found[f"pool{number}"] for number in (1, 2, 3, 4)] == [
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
    ]
    assert "pool5" not in found
    assert "mean" not in found
    assert found["flatten"] == (2048,)
    assert [found[key] for key in ("fc14", "fc15", "fc16")] == [(256,), (256,), (10,)]
    assert list(found)[-6:] == ["flatten", "fc14", "relu14", "fc15", "relu15", "fc16"]


@pytest.mark.parametrize(
    ("shape", "last"), [((3, 64, 64), (4, 4)), ((1, 28, 28), (1, 1)), ((3, 40, 24), (2, 1))]
)
def test_vgg_averages_a_last_map_of_another_size_to_2x2(shape, last):
    found = outputs(build("vgg16", shape), shape)
    assert found["conv13"] == (512, *last)
    assert found["mean"] == (512, 2, 2)
    assert found["fc16"] == (10,)


def test_sizes_of_small_resnet_by_hand():
    model = build("small_resnet", (1, 8, 8), width=4)
    assert {key: module.weight.numel() for key, module in prunable(model).items()} == {
        "conv1": 4 * 9,
        "stage1.conv1": 4 * 4 * 9,
        "stage1.conv2": 4 * 4 * 9,
        "stage2.conv1": 8 * 4 * 9,
        "stage2.conv2": 8 * 8 * 9,
        "stage2.shortcut.0": 8 * 4,
        "stage3.conv1": 16 * 8 * 9,
        "stage3.conv2": 16 * 16 * 9,
        "stage3.shortcut.0": 16 * 8,
        "classifier": 16 * 10,
    }
    found = outputs(model, (1, 8, 8))
    stages = [found[f"stage{number}"] for number in (1, 2, 3)]
    assert stages == [(4, 8, 8), (8, 4, 4), (16, 2, 2)]


LEAST = {"vgg16": 16, "small_cnn": 5, "small_resnet": 4}
LEAST |= dict.fromkeys([*resnet.NAMES, *preactresnet.NAMES], 8) | dict.fromkeys(wideresnet.NAMES, 4)


@pytest.mark.parametrize("name", LEAST)
def test_smallest_images_work_and_smaller_ones_are_refused(name):
    least = LEAST[name]
    assert outputs(build(name, (2, least, least)), (2, least, least))
    for height, width in ((least - 1, 40), (40, least - 1)):
        with pytest.raises(UsageError) as caught:
            build(name, (2, height, width))
        assert str(caught.value) == (
            f"{name}: expected images of at least {least}x{least} pixels, found {height}x{width}"
        )


# ---------------------------------------------------------------- blocks


def silenced(layer):
    """A branch that adds nothing: its last layer is zero."""
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.parametrize(
    "make",
    [lambda: _layers.BasicBlock(8, 8, 1, "symmetric"), lambda: _layers.Bottleneck(8, 2, 1, "")],
)
def test_residual_block_with_a_silent_branch_is_a_relu(make):
    block, x = make().eval(), torch.randn(2, 8, 5, 5)
    silenced(block.bn3 if hasattr(block, "bn3") else block.bn2)
    assert isinstance(block.shortcut, nn.Identity)
    assert torch.equal(block(x), x.relu())


def test_residual_block_adds_a_projection_where_the_shape_changes():
    block, x = _layers.BasicBlock(4, 8, 2, "symmetric").eval(), torch.randn(2, 4, 6, 6)
    silenced(block.bn2)
    projected = torch.einsum(
        "oi,nihw->nohw", block.shortcut[0].weight[:, :, 0, 0], x[..., ::2, ::2]
    )
    expected = (projected / (1 + 1e-5) ** 0.5).relu()
    torch.testing.assert_close(block(x), expected)


def test_parameters_of_preactresnet18_by_hand():
    widths = (64, 128, 256, 512)
    convolutions = 9 * 3 * 64 + 4 * 9 * 64**2  # the first one, and those of stage 1
    norms = 4 * 64  # channels of the four batch norms of stage 1
    for before, width in itertools.pairwise(widths):
        convolutions += 9 * before * width + 9 * width**2 + before * width  # with the shortcut
        convolutions += 2 * 9 * width**2
        norms += before + 3 * width
    norms += 512  # after the last block
    model = build("preactresnet18")
    assert weight_count(model) == convolutions + 512 * 10
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == convolutions + 2 * norms + 512 * 10 + 10 == 11_172_170
    assert [key for key in model.state_dict() if key.startswith("stage1.0.shortcut")] == []


def test_preactresnet18_is_the_one_written_out_by_hand():
    """With stage weights of two blocks: pre-activation order, raw first shortcut, last BN."""
    model = build("preactresnet18", (3, 8, 8), device="cpu").double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    state = model.eval().state_dict()

    def norm(x, key):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        scaled = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        return scaled * state[f"{key}.weight"].view(1, -1, 1, 1) + state[f"{key}.bias"].view(
            1, -1, 1, 1
        )

    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    h = functional.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for step in (0, 1):
            key, stride = f"stage{stage}.{step}", 2 if stage > 1 and step == 0 else 1
            a = norm(h, f"{key}.bn1").clamp(min=0)
            if stride == 2:
                h = functional.conv2d(a, state[f"{key}.shortcut.weight"], stride=2)
            a = functional.conv2d(a, state[f"{key}.conv1.weight"], stride=stride, padding=1)
            a = norm(a, f"{key}.bn2").clamp(min=0)
            h = h + functional.conv2d(a, state[f"{key}.conv2.weight"], padding=1)
    h = norm(h, "bn1").clamp(min=0).mean((2, 3))
    expected = h @ state["classifier.weight"].T + state["classifier.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------- activation


def activations(model):
    """The names of the functions and modules of the trace that are activations."""
    graph = torch.fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    found = [
        modules[str(n.target)] if n.op == "call_module" else n.target
        for n in graph.nodes
        if n.op in ("call_module", "call_function")
    ]
    kinds = {functional.relu: "relu", functional.silu: "silu"}
    return [
        "relu" if isinstance(f, nn.ReLU) else "silu" if isinstance(f, nn.SiLU) else kinds[f]
        for f in found
        if isinstance(f, nn.ReLU | nn.SiLU) or f in kinds
    ]


@pytest.mark.parametrize("name", ACTIVATED)
def test_silu_stands_at_every_place_of_a_relu_and_changes_no_weight(name):
    plain, smooth = build(name), build(name, activation="silu")
    assert [(k, v.shape) for k, v in plain.state_dict().items()] == [
        (k, v.shape) for k, v in smooth.state_dict().items()
    ]
    before, after = activations(plain), activations(smooth)
    assert set(before) == {"relu"}
    assert after == ["silu"] * len(before)


def test_silu_by_hand():
    block, x = _layers.BasicBlock(8, 8, 1, activation="silu").eval(), torch.randn(2, 8, 5, 5)
    silenced(block.bn2)
    torch.testing.assert_close(block(x), x / (1 + (-x).exp()))


def test_vgg_has_no_choice_of_activation():
    with pytest.raises(ValidationError, match="unknown key"):
        registry.entry("arch", "vgg16").params(activation="silu")


def test_unknown_activation_is_told_in_one_line(study_data, load_study):
    study_data["archs"]["small_cnn"] |= {"activation": "gelu"}
    with pytest.raises(UsageError) as caught:
        load_study(study_data)
    assert str(caught.value).endswith(
        "archs.small_cnn.activation = \"gelu\": expected 'relu' or 'silu'; nearest match: 'relu'"
    )


def test_bottleneck_strides_in_its_3x3_convolution():
    block = _layers.Bottleneck(64, 16, 2, "symmetric")
    layers = (block.conv1, block.conv2, block.conv3, block.shortcut[0])
    assert [layer.kernel_size[0] for layer in layers] == [1, 3, 1, 1]
    assert [layer.stride[0] for layer in layers] == [1, 2, 1, 2]
    assert [layer.out_channels for layer in layers] == [16, 16, 64, 64]
    assert _layers.Bottleneck(64, 16, 1, "symmetric").conv3.out_channels == 64


def test_pre_activation_block_adds_the_input_as_it_came():
    block, x = _layers.PreActivationBlock(8, 8, 1, "symmetric").eval(), torch.randn(2, 8, 5, 5)
    silenced(block.conv2)
    assert torch.equal(block(x), x)


def test_pre_activation_block_projects_the_activated_input():
    block = _layers.PreActivationBlock(4, 8, 2, "symmetric").eval()
    x = torch.randn(2, 4, 6, 6)
    silenced(block.conv2)
    torch.testing.assert_close(block(x), block.shortcut((x / (1 + 1e-5) ** 0.5).relu()))


# ---------------------------------------------------------------- padding


def pick_centre(convolution):
    """Weights that copy the pixel under the kernel's centre."""
    nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        convolution.weight[0, 0, 1, 1] = 1
    return convolution


def test_centres_of_strided_convolutions_by_hand():
    x = torch.arange(24.0).view(1, 1, 4, 6)
    symmetric = pick_centre(_layers.conv3x3(1, 1, 2, "symmetric"))
    tensorflow = pick_centre(_layers.conv3x3(1, 1, 2, "tensorflow"))
    assert symmetric(x).flatten().tolist() == [0, 2, 4, 12, 14, 16]
    assert tensorflow(x).flatten().tolist() == [7, 9, 11, 19, 21, 23]


@pytest.mark.parametrize(
    ("sides", "pad"),
    [
        ((6, 8), (0, 1, 0, 1)),
        ((7, 9), (1, 1, 1, 1)),
        ((6, 9), (1, 1, 0, 1)),
        ((7, 8), (0, 1, 1, 1)),
        ((1, 2), (0, 1, 1, 1)),
    ],
)
def test_tensorflow_padding_is_at_the_bottom_and_right_of_even_sides(sides, pad):
    convolution, x = _layers.conv3x3(3, 5, 2, "tensorflow"), torch.randn(2, 3, *sides)
    reference = functional.conv2d(functional.pad(x, pad), convolution.weight, stride=2)
    assert torch.equal(convolution(x), reference)
    assert reference.shape[2:] == (-(-sides[0] // 2), -(-sides[1] // 2))
    if pad == (1, 1, 1, 1):
        symmetric = functional.conv2d(x, convolution.weight, stride=2, padding=1)
        torch.testing.assert_close(convolution(x), symmetric)


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_the_strided_3x3_convolutions_and_nothing_else(name):
    here, there = build(name), build(name, padding="tensorflow")
    assert [(k, v.shape) for k, v in here.state_dict().items()] == [
        (k, v.shape) for k, v in there.state_dict().items()
    ]
    strided = [
        key
        for key, module in prunable(here).items()
        if isinstance(module, nn.Conv2d)
        and module.stride == (2, 2)
        and module.kernel_size == (3, 3)
    ]
    assert len(strided) == (2 if name in wideresnet.NAMES else 3)
    changed = [k for k, v in prunable(there).items() if isinstance(v, _layers.TensorFlowConv2d)]
    assert changed == strided
    assert not any(isinstance(v, _layers.TensorFlowConv2d) for v in prunable(here).values())


@pytest.mark.parametrize("name", ["vgg16", "small_cnn", "small_resnet"])
def test_padding_is_no_parameter_of_the_other_networks(name):
    with pytest.raises(ValidationError, match="unknown key"):
        registry.entry("arch", name).params(padding="tensorflow")


# ---------------------------------------------------------------- normalisation


def test_normalisation_by_hand():
    layer = _layers.Normalise((0.5, 0.25), (0.5, 0.125))
    x = torch.tensor([0.0, 1.0, 0.5, 0.25]).view(1, 2, 1, 2)
    assert layer(x).flatten().tolist() == [-1.0, 1.0, 2.0, 0.0]
    assert not list(layer.parameters())


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet", "wrn28_2"])
def test_network_with_normalisation_is_the_plain_one_on_normalised_images(name):
    torch.manual_seed(0)
    plain = build(name, device="cpu").eval()
    torch.manual_seed(0)
    model, x = build(name, device="cpu", **CIFAR).eval(), torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(x[:, c] - CIFAR["mean"][c]) / CIFAR["std"][c] for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(by_hand), rtol=1e-4, atol=1e-3)
        assert not torch.allclose(model(x), plain(x), rtol=1e-2)


@pytest.mark.parametrize("name", registry.names("arch"))
def test_normalisation_comes_first_and_renames_nothing(name):
    plain, model = build(name), build(name, **CIFAR)
    assert isinstance(model[0], _layers.Normalise)
    added = ["normalise.mean", "normalise.std"]
    assert list(model.state_dict()) == added + list(plain.state_dict())


@pytest.mark.parametrize("key", ["mean", "std"])
def test_normalisation_has_one_value_a_channel(key):
    values = {"mean": [0.5], "std": [0.5]} | {key: [0.5, 0.5, 0.5]}
    with pytest.raises(UsageError) as caught:
        build("resnet18", (1, 28, 28), **values)
    assert str(caught.value) == (
        f"resnet18: {key}: expected one value for each channel of the images (1), found 3"
    )


NORMALISATION_ERRORS = {
    "mean alone": ({"mean": [0.5]}, "archs.small_cnn.mean = [0.5]: expected std too"),
    "std alone": ({"std": [0.5]}, "archs.small_cnn.std = [0.5]: expected mean too"),
    "std of zero": ({"mean": [0.5], "std": [0.0]}, "archs.small_cnn.std.0 = 0.0: expected to be"),
    "one number": ({"mean": 0.5, "std": [0.5]}, "archs.small_cnn.mean = 0.5: expected to be"),
    "not a number": (
        {"mean": [float("nan")], "std": [1]},
        "archs.small_cnn.mean.0 = NaN: expected",
    ),
}


@pytest.mark.parametrize("error", NORMALISATION_ERRORS)
def test_wrong_normalisation_of_a_study_is_told_in_one_line(error, study_data, load_study):
    values, expected = NORMALISATION_ERRORS[error]
    study_data["archs"]["small_cnn"] |= values
    with pytest.raises(UsageError) as caught:
        load_study(study_data)
    (line,) = str(caught.value).splitlines()
    assert expected in line


def test_weights_behind_a_normalisation_are_refused_without_one(tmp_path):
    kept = {"mean": [0.25], "std": [0.5]}
    normalised = build("small_cnn", (1, 8, 8), device="cpu", width=2, **kept)
    path = tmp_path / "model.safetensors"
    weights.save(path, normalised.state_dict())
    with pytest.raises(UsageError, match=r"normalise\.mean"):
        weights.load_into(build("small_cnn", (1, 8, 8), device="cpu", width=2), path)
    weights.load_into(build("small_cnn", (1, 8, 8), device="cpu", width=2, **kept), path)


# ---------------------------------------------------------------- initial weights


@pytest.mark.parametrize(
    ("layer", "fan_in"), [(nn.Conv2d(64, 128, 3), 576), (nn.Linear(512, 200), 512)]
)
def test_initial_weights_are_a_cut_normal_of_variance_two_over_fan_in(layer, fan_in):
    _layers.he_truncated_normal(layer)
    values, sigma = layer.weight.detach(), (2 / fan_in) ** 0.5
    assert float(values.std()) == pytest.approx(sigma, rel=0.01)
    assert float(values.mean()) == pytest.approx(0, abs=0.02 * sigma)
    assert 2.2 * sigma < float(values.abs().max()) <= 2 * sigma / 0.8796
    assert not layer.bias.any()


def test_batch_norm_starts_at_the_identity():
    model = build("wrn28_2", device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert not model.classifier.bias.any()


def test_initial_weights_of_small_cnn_never_change():
    """Results that were published with it hang on these bits."""
    torch.manual_seed(0)
    state = build("small_cnn", (1, 8, 8), device="cpu").state_dict()
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(key.encode() + value.numpy().tobytes())
    assert digest.hexdigest() == "58d709d489e2641676d9651ea25321b04929c19bbb960ba9aa0ec7ca2e31d6db"
