"""Every registered data set always gives the same valid, disjoint splits."""

import atexit
import functools
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import UsageError

DATASETS = registry.names("dataset")
PARTS = ("train", "validation", "test")


@functools.cache
def on_disk():
    """A folder for the data sets that need files: 3 classes with 200 and 20 images."""
    root, rng = Path(tempfile.mkdtemp(prefix="robsparse-contract-")), np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 600), ("test", 60)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 3
        for i, pixels in enumerate(arrays[f"{part}_images"]):
            path = root / part / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    np.savez(root / "all.npz", **arrays)
    atexit.register(shutil.rmtree, root)
    return {
        "npz": {"file": str(root / "all.npz")},
        "imagefolder": {"data_dir": str(root), "cache_dir": str(root / "cache")},
    }


def load(name, **values):
    """Return splits with the default parameters, or with those `values` that it has."""
    params = registry.entry("dataset", name).params
    known = {key: value for key, value in values.items() if key in params.model_fields}
    if name in on_disk():
        known = {"validation_examples": 100} | on_disk()[name] | known
    elif name != "digits":
        known = {"data_dir": "nowhere"} | known
    if "data_dir" in known and not Path(known["data_dir"]).exists():
        pytest.skip(f"{name} is not on this machine; tests/unit/test_datasets.py has a stand-in")
    return datasets.load(name, params(**known))


def images(part):
    """Return each image with its label, as bytes."""
    return [
        x.numpy().tobytes() + bytes([y])
        for x, y in zip(part.x_NCHW, part.y_N.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", DATASETS)
def test_images_are_float32_between_zero_and_one(name):
    splits = load(name)
    for part in (getattr(splits, key) for key in PARTS):
        assert part.x_NCHW.dtype == torch.float32
        assert part.x_NCHW.shape == (len(part), *splits.image_shape)
        assert part.x_NCHW.min() >= 0
        assert 0.5 < part.x_NCHW.max() <= 1


@pytest.mark.parametrize("name", DATASETS)
def test_labels_are_int64_and_every_class_is_in_each_part(name):
    splits = load(name)
    for part in (getattr(splits, key) for key in PARTS):
        assert part.y_N.dtype == torch.int64
        assert part.y_N.shape == (len(part),)
        assert part.y_N.unique().tolist() == list(range(splits.classes))


@pytest.mark.parametrize("name", DATASETS)
def test_parts_have_the_requested_sizes(name):
    splits = load(name, validation_examples=123, test_examples=321)
    fields = registry.entry("dataset", name).params.model_fields
    for key in ("validation", "test"):
        if f"{key}_examples" in fields:
            assert len(getattr(splits, key)) == {"validation": 123, "test": 321}[key]
    default = load(name)
    total = [sum(len(getattr(s, key)) for key in PARTS) for s in (splits, default)]
    assert total[0] == total[1]


@pytest.mark.parametrize("name", DATASETS)
def test_no_image_is_in_two_parts(name):
    """A duplicate in the source counts as another image. Each copy is in one part only."""
    one, other = load(name), load(name, split_seed=1)
    counted = [Counter(i for key in PARTS for i in images(getattr(s, key))) for s in (one, other)]
    assert counted[0] == counted[1]
    if max(counted[0].values()) == 1:
        parts = [set(images(getattr(one, key))) for key in PARTS]
        assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("name", DATASETS)
def test_test_images_do_not_depend_on_the_size_of_the_validation_part(name):
    one, other = load(name), load(name, validation_examples=77)
    assert images(one.test) == images(other.test)


@pytest.mark.parametrize("name", DATASETS)
def test_splits_and_checksum_do_not_depend_on_the_random_state(name):
    torch.manual_seed(1)
    one = load(name)
    torch.manual_seed(2)
    other = load(name)
    for key in PARTS:
        assert images(getattr(one, key)) == images(getattr(other, key))
    assert one.checksum() == other.checksum()


@pytest.mark.parametrize("name", DATASETS)
def test_checksum_notices_one_changed_pixel_or_label(name):
    whole = load(name).checksum()
    splits = load(name)
    splits.test.x_NCHW[-1, 0, 0, 0] += 0.5
    assert splits.checksum() != whole
    splits = load(name)
    splits.train.y_N[0] = (splits.train.y_N[0] + 1) % splits.classes
    assert splits.checksum() != whole


def test_checksum_of_the_digits_is_the_one_of_the_published_results():
    assert load("digits", test_examples=200).checksum() == "9edd9a031d1e92a9"


@pytest.mark.parametrize(
    "sizes",
    [
        {"validation_examples": 5},
        {"test_examples": 9},
        {"validation_examples": 1797},
    ],
)
def test_impossible_sizes_of_the_digits_are_refused(sizes):
    params = registry.entry("dataset", "digits").params
    with pytest.raises((UsageError, ValidationError)):
        datasets.load("digits", params(**sizes))
