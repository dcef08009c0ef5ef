"""Reading weights: everything or nothing, and never code."""

import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import read_tensors
from robsparse.networks import weights
from robsparse.sparsity.layers import prunable


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def good():
    """A state that differs from a fresh network in every entry."""
    return {name: torch.full_like(value, 3) for name, value in network().state_dict().items()}


def test_saved_weights_come_back_with_their_exact_zeros(tmp_path, good):
    good["0.weight"][0] = 0.0
    path = tmp_path / "new" / "folder" / "model.safetensors"
    weights.save(path, good)
    model = network()
    weights.load_into(model, path)
    assert same(model.state_dict(), good)
    assert int(model[0].weight.count_nonzero()) == 3


def test_weights_that_are_a_view_can_be_saved(tmp_path, good):
    good["0.weight"] = torch.arange(6.0).view(3, 2).t()
    weights.save(tmp_path / "m.safetensors", good)
    model = network()
    weights.load_into(model, tmp_path / "m.safetensors")
    assert torch.equal(model[0].weight, good["0.weight"])


def test_files_are_plain_safetensors_and_the_same_bits_come_back(tmp_path):
    model = models.build("resnet18", registry.entry("arch", "resnet18").params(), (3, 32, 32), 10)
    with torch.no_grad():
        for layer in prunable(model).values():
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.01)
    state = model.state_dict()
    path = tmp_path / "model.safetensors"
    weights.save(path, state)
    assert same(safetensors.torch.load_file(path), state)
    assert {name: value.tolist() for name, value in read_tensors(path).items()} == {
        name: value.tolist() for name, value in state.items()
    }


def test_packed_weights_of_an_older_version_are_refused_in_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    packed = {"0.weight.values": torch.ones(1), "0.weight.gaps": torch.zeros(1).byte()}
    safetensors.torch.save_file(packed, path, {"robsparse.packed": '{"0.weight": [3, 2]}'})
    model = network()
    before = snapshot(model)
    for read in (lambda: weights.load_into(model, path), lambda: read_tensors(path)):
        with pytest.raises(UsageError) as caught:
            read()
        assert str(caught.value) == (
            f"{path}: packed weights of an older version, expected plain safetensors; "
            "train this network again"
        )
    assert same(model.state_dict(), before)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_entry(name, value):
    return lambda state: state | {name: value}


DAMAGES = {
    "missing key": (without("0.bias"), "'0.bias' are missing"),
    "missing statistics": (without("1.running_var"), "'1.running_var' are missing"),
    "extra key": (with_entry("2.weight", torch.ones(1)), "unexpected weights '2.weight'"),
    "wrong shape": (with_entry("0.weight", torch.ones(2, 4)), r"shape \(2, 4\), expected \(2, 3\)"),
    "transposed": (with_entry("0.weight", torch.ones(3, 2)), r"shape \(3, 2\), expected \(2, 3\)"),
    "NaN": (with_entry("0.bias", torch.tensor([1.0, float("nan")])), "'0.bias' holds NaN"),
    "infinite": (with_entry("1.running_mean", torch.tensor([-float("inf"), 0])), "infinite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unfit_entry_is_named_and_nothing_is_loaded(damage, tmp_path, good):
    change, expected = DAMAGES[damage]
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(change(good), path)
    model = network()
    before = snapshot(model)
    with pytest.raises(UsageError, match=expected) as caught:
        weights.load_into(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(model.state_dict(), before)


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


CONTENTS = {
    "empty": lambda good, tmp_path: b"",
    "cut": lambda good, tmp_path: safetensors.torch.save(good)[:-5],
    "cut in the header": lambda good, tmp_path: safetensors.torch.save(good)[:20],
    "text": lambda good, tmp_path: b"these are no weights" * 20,
    "pickle": lambda good, tmp_path: pickle.dumps(Marker(tmp_path / "ran")),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_file_is_one_line_and_runs_nothing(content, tmp_path, good):
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENTS[content](good, tmp_path))
    model = network()
    before = snapshot(model)
    with pytest.raises(UsageError, match="not a readable file of weights") as caught:
        weights.load_into(model, path)
    assert "\n" not in str(caught.value)
    assert same(model.state_dict(), before)
    assert not (tmp_path / "ran").exists()


def test_torch_file_with_code_under_our_name_does_not_run(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save(Marker(tmp_path / "ran"), path)
    with pytest.raises(UsageError):
        weights.load_into(network(), path)
    assert not (tmp_path / "ran").exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # the trap does work
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "folder"])
def test_path_without_a_file_is_one_line(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=name):
        weights.load_into(network(), tmp_path / name)


def test_failed_save_keeps_the_old_file(tmp_path, good):
    path = tmp_path / "model.safetensors"
    weights.save(path, good)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        weights.save(path, {"0.weight": None})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
