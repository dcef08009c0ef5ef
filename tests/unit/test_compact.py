"""Sparse tensors come back from disk bit for bit, and take little of it."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from robsparse import compact, models, registry, weights
from robsparse.errors import UsageError
from robsparse.sparsity import prunable


@given(
    live=st.lists(st.integers(0, 2999), unique=True, max_size=60),
    shape=st.sampled_from([(3000,), (30, 100), (10, 3, 10, 10)]),
)
def test_packing_and_unpacking_changes_nothing(live, shape):
    dense = np.zeros(3000, dtype=np.float32)
    dense[live] = np.random.default_rng(0).normal(size=len(live))
    values, gaps = compact.pack(dense.reshape(shape))
    assert len(values) == np.count_nonzero(dense)
    found = compact.unpack(values, gaps, shape)
    assert found.shape == shape
    assert np.array_equal(found.ravel(), dense)


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        ([0], [0]),
        ([254], [254]),
        ([255], [255, 0]),
        ([256, 257], [255, 1, 0]),
        ([510, 1020], [255, 255, 0, 255, 254]),
        ([], []),
    ],
)
def test_gaps_by_hand(live, expected):
    dense = np.zeros(2000, dtype=np.float32)
    dense[live] = 1
    assert compact.pack(dense)[1].tolist() == expected


BAD = {
    "more gaps than values": ([1.0], [0, 0], (5,)),
    "more values than gaps": ([1.0, 2.0], [0], (5,)),
    "beyond the end": ([1.0], [5], (5,)),
    "far beyond the end": ([1.0], [255, 255, 0], (5,)),
}


@pytest.mark.parametrize("name", BAD)
def test_parts_that_do_not_fit_are_refused(name):
    values, gaps, shape = BAD[name]
    with pytest.raises(ValueError, match=r"values and|more than"):
        compact.unpack(np.array(values), np.array(gaps, dtype=np.uint8), shape)


def test_resnet_at_99_percent_takes_less_than_a_megabyte_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet18", registry.entry("arch", "resnet18").params(), (3, 32, 32), 10)
    with torch.no_grad():
        for module in prunable(model).values():
            module.weight.mul_(torch.rand_like(module.weight) < 0.01)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    weights.save(path, state)
    assert path.stat().st_size < 1e6
    other = models.build("resnet18", registry.entry("arch", "resnet18").params(), (3, 32, 32), 10)
    weights.load_into(other, path)
    assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())


def test_dense_tensors_are_ordinary_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    state = {"w": np.ones((4, 5), np.float32), "b": np.zeros(3, np.float32), "n": np.array(7)}
    compact.save(path, state)
    found = safetensors.numpy.load_file(path)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in state.items()
    }


@pytest.mark.parametrize("fault", ["gone", "too long"])
def test_damaged_file_is_one_line(fault, tmp_path):
    path = tmp_path / "m.safetensors"
    arrays = {"w.values": np.ones(1, np.float32), "w.gaps": np.array([9], np.uint8)}
    if fault == "gone":
        del arrays["w.gaps"]
    shapes = {compact.KEY: json.dumps({"w": [2, 3]})}
    safetensors.numpy.save_file(arrays, path, shapes)
    with pytest.raises(UsageError, match="not a readable file of weights"):
        weights.load_into(torch.nn.Linear(3, 2), path)
