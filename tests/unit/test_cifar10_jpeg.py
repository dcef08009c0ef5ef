"""The photographs of CIFAR-10 as JPEG files: archive, folders, cache, and the messages."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.datasets import cifar10_jpeg

CLASSES = ("cat", "dog")
COUNTS = {"train": 30, "test": 8}


def photographs():
    """JPEG files by name: 2 classes of 32x32 pixels; cats are dark, dogs are bright."""
    random, files = np.random.default_rng(0), {}
    for part, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            for i in range(count // 2):
                pixels = random.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(
                    150 * label
                )
                memory = io.BytesIO()
                Image.fromarray(pixels).save(memory, "JPEG")
                files[f"{part}/{name}/{i:04}.jpg"] = memory.getvalue()
    return files


def pack(files, folder):
    """Write the archive, with the files in an order that is not that of their names."""
    with tarfile.open(folder / "cifar10-jpeg.tar.xz", "w:xz") as packed:
        for name in reversed(files):
            member = tarfile.TarInfo(f"cifar10-jpeg/{name}")
            member.size = len(files[name])
            packed.addfile(member, io.BytesIO(files[name]))


def unpack(files, root):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def digest_of(files):
    """The digest of the module, written again in a few lines."""
    text = b"".join(
        b"%s\0%d\0%s" % (name.encode(), len(files[name]), files[name]) for name in sorted(files)
    )
    return hashlib.sha256(text).hexdigest()


@pytest.fixture
def small(monkeypatch):
    """A data set of 38 photographs in place of 60,000."""
    files = photographs()
    monkeypatch.setattr(cifar10_jpeg, "COUNTS", COUNTS)
    monkeypatch.setattr(cifar10_jpeg, "DIGEST", digest_of(files))
    return files


def read(folder, **values):
    values = {"validation_examples": 10, "cache_dir": str(folder / "cache")} | values
    params = registry.entry("dataset", "cifar10_jpeg").params
    return datasets.load("cifar10_jpeg", params(data_dir=str(folder), **values))


def test_archive_and_both_places_of_folders_give_the_same_images(small, tmp_path):
    places = [tmp_path / name for name in ("packed", "unpacked", "named")]
    for place in places:
        place.mkdir()
    pack(small, places[0])
    unpack(small, places[1])
    unpack(small, places[2] / "cifar10-jpeg")
    packed, *others = (read(place) for place in places)
    assert [other.checksum() for other in others] == [packed.checksum()] * 2
    assert (len(packed.train), len(packed.validation), len(packed.test)) == (20, 10, 8)
    assert packed.image_shape == (3, 32, 32)
    for part in (packed.train, packed.validation, packed.test):
        assert torch.equal((part.x_NCHW.mean((1, 2, 3)) > 0.5).long(), part.y_N)
    assert set(packed.test.y_N[:4].tolist()) == {0, 1}  # not in the order of the folders


def test_pixels_are_those_that_the_image_library_decodes(small, tmp_path):
    pack(small, tmp_path)
    expected = {
        np.asarray(Image.open(io.BytesIO(content))).tobytes()
        for name, content in small.items()
        if name.startswith("test/")
    }
    found = (read(tmp_path).test.x_NCHW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert {image.tobytes() for image in found} == expected


def test_images_are_decoded_once_and_then_need_no_archive(small, tmp_path, monkeypatch):
    pack(small, tmp_path)
    first = read(tmp_path)
    (tmp_path / "cifar10-jpeg.tar.xz").unlink()
    monkeypatch.setattr(cifar10_jpeg, "_decode", lambda files: pytest.fail("decoded again"))
    assert read(tmp_path).checksum() == first.checksum()


def test_changed_cache_is_refused(small, tmp_path):
    pack(small, tmp_path)
    read(tmp_path)
    [cache] = (tmp_path / "cache").glob("*.npz")
    with np.load(cache) as stored:
        arrays = dict(stored)
    arrays["test_images"][0, 0, 0, 0] ^= 1
    np.savez(cache, **arrays)
    with pytest.raises(UsageError, match=r"npz: its checksum does not fit .*delete this file"):
        read(tmp_path)


def test_missing_images_are_one_line_that_says_what_to_provide(tmp_path):
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    message = str(caught.value)
    for part in (
        "cifar10-jpeg.tar.xz",
        "50,000 images",
        "datasets.cifar10_jpeg.data_dir",
        "'cifar10'",
    ):
        assert part in message
    assert "\n" not in message
    assert not list(tmp_path.glob("cache/*.npz"))


def one_less(files):
    return dict([*files.items()][:-1])


def another(files):
    return files | {"train/cat/0001.jpg": files["train/cat/0000.jpg"]}


def moved(files):
    """An image of a cat in the folder of dogs, with as many images in each part."""
    name, content = next(iter(files.items()))
    return {k: v for k, v in files.items() if k != name} | {"train/dog/9999.jpg": content}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (one_less, "expected 8 images in test/, found 7"),
        (another, "these are other images .*'imagefolder' reads any images"),
        (moved, "these are other images"),
    ],
)
def test_other_images_are_refused(change, expected, small, tmp_path):
    pack(change(small), tmp_path)
    with pytest.raises(UsageError, match=expected):
        read(tmp_path)
    assert not list(tmp_path.glob("cache/*.npz"))


def test_damaged_archive_is_one_line(tmp_path):
    (tmp_path / "cifar10-jpeg.tar.xz").write_bytes(b"not an archive")
    with pytest.raises(UsageError, match=r"cifar10-jpeg\.tar\.xz: not a readable archive"):
        read(tmp_path)


def test_the_real_archive_holds_60000_photographs(repository, tmp_path):
    folder = Path(repository, "data")
    if not (folder / "cifar10-jpeg.tar.xz").is_file():
        pytest.skip("no data/cifar10-jpeg.tar.xz in this checkout")
    splits = read(folder, cache_dir=str(tmp_path), validation_examples=2000)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (48_000, 2_000, 10_000)
    assert splits.test.y_N.bincount().tolist() == [1000] * 10
