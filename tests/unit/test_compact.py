"""Compact files: the bytes of their layout, the same network comes back, damage is one line."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.networks import compact
from robsparse.sparsity.layers import prunable

SHAPE = (1, 8, 8)


def described(arch="small_cnn", shape=SHAPE, **params):
    return {
        "arch": arch,
        "arch_params": params,
        "dataset": "digits",
        "image_shape": shape,
        "classes": 10,
        "provenance": {"study": "s"},
    }


def network(density=0.1, arch="small_cnn", shape=SHAPE, **params):
    """A network with trained statistics of batch norm and random zeros."""
    settings = registry.entry("arch", arch).params(**params)
    model = models.build(arch, settings, shape, 10)
    model(torch.rand(16, *shape))
    with torch.no_grad():
        for layer in prunable(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < density)
    return model.eval()


def stored(path):
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


# ---------------------------------------------------------------- layout


def test_layout_by_hand(tmp_path):
    sparse, dense = torch.zeros(20, 30), torch.arange(6.0).view(2, 3)
    sparse[0, 2], sparse[0, 3], sparse[19, 29] = 1.5, -2.0, 3.0
    path = tmp_path / "one.safetensors"
    compact.write(path, {"sparse": sparse, "dense": dense}, **described())
    arrays, metadata = stored(path)
    assert arrays.keys() == {"sparse.values", "sparse.gaps", "dense"}
    assert arrays["sparse.values"].tolist() == [1.5, -2.0, 3.0]
    assert arrays["sparse.gaps"].tolist() == [2, 1, 599 - 3]  # positions 2, 3 and 599
    assert arrays["sparse.gaps"].dtype == np.uint16
    assert arrays["dense"].tolist() == dense.tolist()
    assert json.loads(metadata["robsparse.compact"])["sparse"] == {"sparse": [20, 30]}


@pytest.mark.parametrize(("last", "width"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4)], ids=str)
def test_gaps_take_the_fewest_bytes(last, width):
    value = torch.zeros(100_000)
    value[0] = value[last] = 1.0
    assert compact.size({"w": value}) == 2 * (4 + width)


def test_size_is_that_of_the_smaller_form():
    sparse, dense = torch.zeros(5, 4), torch.ones(3)
    sparse[0, 0] = sparse[4, 3] = -1.0
    assert compact.size({"sparse": sparse, "dense": dense}) == 2 * (4 + 1) + 3 * 4
    assert compact.size({"half": sparse.half(), "int": torch.tensor(7)}) == 2 * (2 + 1) + 8
    assert compact.size({"bf16": sparse.bfloat16(), "zero": torch.zeros(9)}) == 2 * (2 + 1)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
def test_size_is_what_the_file_holds(density, tmp_path):
    state = network(density).state_dict()
    compact.write(tmp_path / "one.safetensors", state, **described())
    arrays, _ = stored(tmp_path / "one.safetensors")
    assert compact.size(state) == sum(array.nbytes for array in arrays.values())


def test_resnet18_at_99_percent_needs_less_than_7_bytes_for_each_weight(tmp_path):
    model = network(0.01, "resnet18", (3, 32, 32))
    nonzero = sum(int(m.weight.count_nonzero()) for m in prunable(model).values())
    rest = sum(v.nbytes for v in model.state_dict().values() if v.ndim < 2)
    assert compact.size(model.state_dict()) - rest < 7 * nonzero


# ---------------------------------------------------------------- the same network comes back


@given(
    st.lists(st.integers(0, 2**31), max_size=6),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8]),
    st.integers(1, 70_000),
)
def test_every_tensor_comes_back_from_values_and_gaps(places, dtype, size):
    value = torch.zeros(size, dtype=dtype)
    for place in places:
        value[place % size] = place % 100 + 1
    gaps = compact._gaps(value)
    back = torch.zeros_like(value)
    back[gaps.cumsum(0)] = value[value != 0]
    assert torch.equal(back, value)
    assert not len(gaps) or int(gaps.max()) <= np.iinfo(compact._gap_type(gaps)).max


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize(
    ("arch", "shape", "params"),
    [
        ("small_cnn", (1, 8, 8), {"width": 4}),
        ("small_resnet", (3, 16, 16), {"width": 4, "activation": "silu"}),
        ("preactresnet18", (3, 8, 8), {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}),
    ],
)
def test_network_comes_back_bit_for_bit(arch, shape, params, density, tmp_path):
    model = network(density, arch, shape, **params)
    path = tmp_path / "one.safetensors"
    compact.write(path, model.state_dict(), **described(arch, shape, **params))
    before = torch.get_rng_state()
    back, description = compact.read(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not back.training
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype
    assert (description.arch, description.image_shape, description.classes) == (arch, shape, 10)
    assert description.provenance == {"study": "s"}


def test_the_same_network_gives_the_same_bytes(tmp_path):
    state = network().state_dict()
    for name in ("one", "other"):
        compact.write(tmp_path / name, state, **described())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


# ---------------------------------------------------------------- wrong files


def changed(path, change):
    """Write a compact file again, with other arrays or another description."""
    arrays, metadata = stored(path)
    text = json.loads(metadata["robsparse.compact"])
    change(arrays, text)
    safetensors.numpy.save_file(arrays, path, {"robsparse.compact": json.dumps(text)})


def put(array, index, value):
    def change(arrays, text):
        arrays[array][index] = value

    return change


def cut(array):
    def change(arrays, text):
        arrays[array] = arrays[array][:-1]

    return change


def say(**values):
    return lambda arrays, text: text.update(values)


WRONG = {
    "position past the end": (put("3.weight.gaps", -1, 255), "'3.weight.gaps' are not the positio"),
    "a value less": (cut("3.weight.values"), "'3.weight.gaps' are not the positions"),
    "values are not there": (lambda a, t: a.pop("3.weight.values"), "'3.weight.values' is missing"),
    "a dense tensor less": (
        lambda a, t: a.pop("1.running_mean"),
        "the weights '1.running_mean' are missing",
    ),
    "NaN": (put("3.weight.values", 0, np.nan), "'3.weight' holds NaN"),
    "another shape": (
        lambda a, t: t["sparse"].update({"3.weight": [288]}),
        r"'3.weight' has shape \(288,\), the arch expects \(8, 4, 3, 3\)",
    ),
    "a huge shape": (
        lambda a, t: t["sparse"].update({"3.weight": [2**31, 2**31]}),
        "'3.weight' has shape",
    ),
    "an unknown tensor": (lambda a, t: a.update(extra=np.ones(2)), "unexpected weights 'extra'"),
    "another width": (say(arch_params={"width": 5}), "has shape"),
    "no arch": (say(arch="small_cn"), "unknown arch 'small_cn'.*nearest match: 'small_cnn'"),
    "no parameter": (
        say(arch_params={"wide": 4}),
        "arch_params.wide = 4: unknown key",
    ),
    "no classes": (say(classes=0), "metadata: classes = 0: .*greater than 0"),
    "another version": (say(version=2), "metadata: version = 2: expected 1"),
    "an unknown key": (say(runs="code"), "metadata: runs = .*unknown key"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_damage_is_one_line_that_names_the_file(wrong, tmp_path):
    change, expected = WRONG[wrong]
    path = tmp_path / "one.safetensors"
    compact.write(path, network(width=4).state_dict(), **described(width=4))
    compact.read(path)
    changed(path, change)
    with pytest.raises(UsageError, match=expected) as caught:
        compact.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no weights at all, only text"])
def test_file_that_is_no_safetensors_is_one_line(content, tmp_path):
    path = tmp_path / "one.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"no such file|not a readable safetensors file") as caught:
        compact.read(path)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_json_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3)}, path, {"robsparse.compact": "{"})
    with pytest.raises(UsageError, match="not valid JSON"):
        compact.read(path)


def test_plain_weights_are_no_compact_file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"w": np.ones(3)}, path)
    with pytest.raises(UsageError, match="not a compact file, expected the metadata"):
        compact.read(path)


def test_lines_of_the_document_read_the_file(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = network(0.02).state_dict()
    compact.write(tmp_path / "best_val.compact.safetensors", state, **described())
    text = (repository / "docs" / "use.md").read_text(encoding="utf-8")
    [code] = [part.partition("```")[0] for part in text.split("```python\n") if "safe_open" in part]
    found: dict = {}
    exec(code, found)
    assert found["state"].keys() == state.keys()
    assert all(np.array_equal(found["state"][name], state[name].numpy()) for name in state)
