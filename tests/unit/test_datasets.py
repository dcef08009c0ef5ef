"""Image folders and npz files: what is read, and the one line that a bad one is told."""

import gzip
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.datasets import _torchvision, fashion_mnist, imagefolder
from robsparse.datasets._arrays import read_extra, stratified_split

RNG = np.random.default_rng(0)


def load(name, **values):
    return datasets.load(name, registry.entry("dataset", name).params(**values))


# ---------------------------------------------------------------- image folders


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 training and 6 test images; red means `b`."""
    root = tmp_path / "images"
    for part, count in (("train", 20), ("test", 6)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = RNG.integers(0, 200, (6, 5, 3), dtype=np.uint8)
                pixels[..., 0] = 250 if name == "b" else 10
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def read(folder, tmp_path):
    def load_folder(**values):
        values = {"validation_examples": 10, "cache_dir": str(tmp_path / "cache")} | values
        return load("imagefolder", data_dir=str(folder), **values)

    return load_folder


def test_a_folder_of_test_images_alone_has_empty_training_parts(folder, read):
    whole = read()
    remove(folder / "train")
    splits = read()
    assert (len(splits.train), len(splits.validation), splits.classes) == (0, 0, 2)
    assert splits.image_shape == whole.image_shape
    assert torch.equal(splits.test.x_NCHW, whole.test.x_NCHW)
    assert torch.equal(splits.some_images(3), splits.test.x_NCHW[:3])
    assert torch.equal(whole.some_images(3), whole.train.x_NCHW[:3])


def test_folders_are_classes_in_order(read):
    splits = read()
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 12)
    assert splits.image_shape == (3, 6, 5)
    assert splits.classes == 2
    for part in (splits.train, splits.validation, splits.test):
        red = part.x_NCHW[:, 0].mean(dim=(1, 2)) > 0.9
        assert torch.equal(red.long(), part.y_N)
    assert splits.validation.y_N.sum() == 5
    # Shuffled, so that the first images are of both classes, the same every time.
    assert len(set(splits.test.y_N[:6].tolist())) == 2
    assert torch.equal(splits.test.x_NCHW, read(split_seed=3).test.x_NCHW)


def test_all_images_are_trained_on_where_a_study_says_so(read):
    """Images, labels and order are those of the training part; the validation images are in it."""
    held_out, shared = read(), read(train_on_validation=True)
    assert (len(shared.train), len(shared.validation), len(shared.test)) == (40, 10, 12)
    assert torch.equal(shared.validation.x_NCHW, held_out.validation.x_NCHW)
    assert torch.equal(shared.test.x_NCHW, held_out.test.x_NCHW)

    def rows(*parts):
        return sorted(
            (int(label), image.numpy().tobytes())
            for part in parts
            for image, label in zip(part.x_NCHW, part.y_N, strict=True)
        )

    assert rows(shared.train) == rows(held_out.train, held_out.validation)
    assert shared.checksum() != held_out.checksum()


def test_description_counts_all_images_where_they_are_trained_on():
    params = registry.entry("dataset", "cifar10").params
    assert params().description().train_examples == 48_000
    assert params(train_on_validation=True).description().train_examples == 50_000
    assert params(train_examples=6_000).description().train_examples == 6_000


def test_some_of_the_images_that_are_not_held_out_are_trained_on(read):
    """Those of the whole training part, in its order; held-out and test images stay the same."""
    whole, some = read(), read(train_examples=12)
    assert torch.equal(some.train.x_NCHW, whole.train.x_NCHW[:12])
    assert torch.equal(some.train.y_N, whole.train.y_N[:12])
    assert 0 < some.train.y_N.sum() < 12  # not one class only
    assert torch.equal(some.validation.x_NCHW, whole.validation.x_NCHW)
    assert torch.equal(some.test.x_NCHW, whole.test.x_NCHW)
    with pytest.raises(
        UsageError, match=r"imagefolder\.train_examples = 31: expected at most the 30"
    ):
        read(train_examples=31)
    with pytest.raises(ValidationError, match="expected null beside train_on_validation"):
        read(train_examples=12, train_on_validation=True)


def test_images_are_decoded_once_and_again_when_one_changes(read, folder, monkeypatch, tmp_path):
    first, decoded = read(), []
    ordinary = imagefolder._decode
    monkeypatch.setattr(imagefolder, "_decode", lambda files: decoded.append(1) or ordinary(files))
    assert read().checksum() == first.checksum()
    assert decoded == []
    Image.new("RGB", (5, 6), (250, 1, 2)).save(folder / "train" / "b" / "0.png")
    assert read().checksum() != first.checksum()
    assert decoded == [1]
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


def test_grey_images_have_one_channel_if_all_are_grey(read, folder):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert read().image_shape == (1, 6, 5)
    Image.new("RGB", (5, 6)).save(folder / "train" / "a" / "0.png")
    assert read().image_shape == (3, 6, 5)


def remove(path):
    for each in sorted(path.rglob("*"), reverse=True):
        each.unlink() if each.is_file() else each.rmdir()
    path.rmdir()


def one_class(root):
    remove(root / "train" / "b")
    remove(root / "test" / "b")


BAD_FOLDERS = {
    "no test": (lambda root: remove(root / "test"), r"images/test: no such folder"),
    "one class": (
        one_class,
        r"images/train: expected at least two folders, one for each class, found 1",
    ),
    "unreadable": (
        lambda root: (root / "test" / "a" / "3.png").write_text("not an image"),
        r"test/a/3\.png: not a readable image",
    ),
    "truncated": (
        lambda root: (root / "test" / "a" / "3.png").write_bytes(
            (root / "test" / "a" / "3.png").read_bytes()[:60]
        ),
        r"test/a/3\.png: not a readable image",
    ),
    "mixed sizes": (
        lambda root: Image.new("RGB", (7, 6)).save(root / "train" / "b" / "1.png"),
        r"train/b/1\.png: expected all images of one size, found 7x6 here and 5x6 in .*train/a/0",
    ),
    "other classes in test": (
        lambda root: (root / "test" / "b").rename(root / "test" / "c"),
        r"expected the same classes in train and test, found 'b' only in train",
    ),
    "empty class": (
        lambda root: [path.unlink() for path in (root / "test" / "a").iterdir()],
        r"test/a: found no images",
    ),
}


@pytest.mark.parametrize("error", BAD_FOLDERS)
def test_bad_folder_is_one_line_that_names_it(error, folder, read, tmp_path):
    spoil, expected = BAD_FOLDERS[error]
    spoil(folder)
    with pytest.raises(UsageError, match=expected) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*.npz"))


def test_too_many_validation_images_are_refused(read):
    with pytest.raises(UsageError, match=r"datasets\.imagefolder\.validation_examples = 40"):
        read(validation_examples=40)


# ---------------------------------------------------------------- npz


def arrays(**changes):
    images, labels = RNG.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8), np.arange(40) % 4
    test = {"test_images": images[:8], "test_labels": labels[:8]}
    return {"train_images": images, "train_labels": labels} | test | changes


@pytest.fixture
def saved(tmp_path):
    def load_saved(**changes):
        np.savez(tmp_path / "mine.npz", **arrays(**changes))
        return load("npz", file=str(tmp_path / "mine.npz"), validation_examples=10)

    return load_saved


def test_npz_is_read_in_any_usual_form(saved):
    one = arrays()
    bytes_ = saved(**one)
    assert bytes_.image_shape == (3, 6, 5)
    assert (len(bytes_.train), bytes_.classes) == (30, 4)
    assert torch.equal(
        bytes_.test.x_NCHW, torch.tensor(one["test_images"]).permute(0, 3, 1, 2) / 255
    )
    for change in (lambda a: a.transpose(0, 3, 1, 2), lambda a: a / 255.0):
        images = {key: change(one[key]) for key in ("train_images", "test_images")}
        other = saved(**one | images)
        torch.testing.assert_close(other.test.x_NCHW, bytes_.test.x_NCHW)
    grey = {key: one[key][..., 0] for key in ("train_images", "test_images")}
    assert saved(**one | grey).image_shape == (1, 6, 5)


IMAGES = arrays()["train_images"]
BAD_ARRAYS = {
    "floats of 255": ({"train_images": IMAGES.astype(float)}, r"found \[0, 255\]; .*divide by 255"),
    "NaN": ({"train_images": np.where(IMAGES > 250, np.nan, 0.5)}, "found NaN"),
    "whole numbers": ({"train_images": IMAGES.astype(np.int64)}, "expected uint8 .* found int64"),
    "five channels": ({"train_images": np.zeros((40, 6, 5, 5), np.uint8)}, r"found shape \(40, 6"),
    "labels as floats": ({"train_labels": np.zeros(40)}, "found float64"),
    "negative labels": ({"train_labels": np.arange(40) - 1}, r"found -1\.\.38"),
    "a class is missing": ({"train_labels": np.arange(40) % 2 * 2}, "found none of 1"),
    "one class": ({"train_labels": np.zeros(40, int)}, "found none of 1"),
    "a class of test alone": ({"test_labels": np.full(8, 9)}, r"expected labels 0\.\.3, found 9"),
    "lengths": ({"train_labels": np.arange(39) % 4}, "found 40 images but 39 labels"),
    "shapes": ({"test_images": IMAGES[:8, :5]}, r"are \(3, 6, 5\), test images \(3, 5, 5\)"),
}


@pytest.mark.parametrize("error", BAD_ARRAYS)
def test_bad_array_is_refused_with_what_was_found(error, saved):
    changes, expected = BAD_ARRAYS[error]
    with pytest.raises(UsageError, match=expected) as caught:
        saved(**changes)
    assert str(caught.value).count("mine.npz") == 1


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def test_python_objects_are_never_unpickled(saved, tmp_path):
    with pytest.raises(UsageError, match="never unpickled"):
        saved(train_labels=np.array([Bomb()] * 40, dtype=object))
    (tmp_path / "mine.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UsageError, match=r"mine\.npz"):
        load("npz", file=str(tmp_path / "mine.npz"))


def test_missing_file_and_missing_array(tmp_path):
    with pytest.raises(UsageError, match="not a readable npz file"):
        load("npz", file=str(tmp_path / "none.npz"))
    np.savez(tmp_path / "some.npz", train_images=IMAGES)
    with pytest.raises(
        UsageError, match=r"no array 'train_labels', expected .* found train_images"
    ):
        load("npz", file=str(tmp_path / "some.npz"))


def test_pseudo_labelled_images_have_the_classes_of_the_data_set(tmp_path):
    path = tmp_path / "extra.npz"
    np.savez(path, images=IMAGES, labels=np.arange(40) % 4)
    assert len(read_extra(path, (3, 6, 5), 4)) == 40
    with pytest.raises(UsageError, match=r"expected labels 0\.\.2, found 0\.\.3"):
        read_extra(path, (3, 6, 5), 3)


@pytest.mark.parametrize("names", [("image", "label"), ("images", "labels")])
def test_extra_images_have_either_pair_of_names(names, tmp_path):
    path = tmp_path / "extra.npz"
    np.savez(path, **dict(zip(names, (IMAGES, np.arange(40) % 4), strict=True)))
    part = read_extra(path, (3, 6, 5), 4)
    assert torch.equal(part.x_NCHW, torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255)
    assert part.y_N.tolist() == [i % 4 for i in range(40)]


def test_extra_images_need_both_arrays_of_a_pair(tmp_path):
    np.savez(tmp_path / "extra.npz", image=IMAGES, labels=np.arange(40) % 4)
    with pytest.raises(UsageError, match=r"no array 'images', expected images, labels, found"):
        read_extra(tmp_path / "extra.npz", (3, 6, 5), 4)


# ---------------------------------------------------------------- torchvision's


def pretend(monkeypatch, present):
    """torchvision with data sets of 400 images, there or not."""

    def make(root, download, **which):
        if not present:
            raise OSError("no route to host") if download else RuntimeError("not found")
        train = which.get("train", which.get("split") == "train")
        count = 400 if train else 30
        images = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(count) % 10
        if "split" in which:  # SVHN: channels first, another name
            return SimpleNamespace(data=images.transpose(0, 3, 1, 2), labels=labels)
        return SimpleNamespace(data=images, targets=labels.tolist())

    names = ("CIFAR10", "CIFAR100", "SVHN", "FashionMNIST")
    fake = SimpleNamespace(datasets=SimpleNamespace(**dict.fromkeys(names, make)))
    monkeypatch.setattr(_torchvision, "import_torchvision", lambda: fake)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_official_test_images_and_held_out_training_images(name, monkeypatch, tmp_path):
    pretend(monkeypatch, present=True)
    splits = load(name, data_dir=str(tmp_path), validation_examples=100)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (300, 100, 30)
    assert splits.image_shape == (3, 32, 32)
    assert splits.test.y_N.tolist() == [i % 10 for i in range(30)]
    assert splits.validation.y_N.bincount().tolist() == [10] * 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist"])
def test_without_data_and_network_three_ways_are_named(name, monkeypatch, tmp_path):
    pretend(monkeypatch, present=False)
    with pytest.raises(UsageError) as caught:
        load(name, data_dir=str(tmp_path / "none"))
    message = str(caught.value)
    for part in (f"datasets.{name}.data_dir", "network", "'imagefolder' or 'npz'", "no route"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist"])
def test_what_planning_needs_is_known_without_the_data(name, monkeypatch):
    monkeypatch.setattr(datasets, "load", lambda *_: pytest.fail("loaded"))
    found = datasets.describe(name, registry.entry("dataset", name).params())
    assert found.image_shape[1] in (28, 32)
    assert 48000 <= found.train_examples <= 73257


def test_flips_are_off_for_digits_alone():
    flips = {
        name: registry.entry("dataset", name).params.model_fields["augmentation"].default.flip
        for name in ("cifar10", "cifar100", "fashion_mnist", "svhn", "digits", "npz")
    }
    assert flips == {
        "cifar10": True,
        "cifar100": True,
        "fashion_mnist": True,
        "svhn": False,
        "digits": False,
        "npz": False,
    }


@pytest.mark.parametrize("where", ["data_dir", "system"])
def test_packed_fashion_mnist_is_unpacked_to_where_torchvision_looks(where, monkeypatch, tmp_path):
    source, folder = tmp_path / where, tmp_path / "data_dir"
    source.mkdir()
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "system")
    for name in fashion_mnist.FILES:
        (source / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    pretend(monkeypatch, present=False)
    with pytest.raises(UsageError):
        load("fashion_mnist", data_dir=str(folder))
    raw = folder / "FashionMNIST" / "raw"
    assert {p.name: p.read_text() for p in raw.iterdir()} == {n: n for n in fashion_mnist.FILES}


# ---------------------------------------------------------------- the digits


def test_digits_may_be_trained_on_some_images_and_all_others_stay(repository):
    whole, some = load("digits"), load("digits", train_examples=50)
    assert len(some.train) == 50
    assert torch.equal(some.train.x_NCHW, whole.train.x_NCHW[:50])
    assert torch.equal(some.validation.x_NCHW, whole.validation.x_NCHW)
    assert torch.equal(some.test.x_NCHW, whole.test.x_NCHW)
    params = registry.entry("dataset", "digits").params(train_examples=50)
    assert params.description().train_examples == 50
    with pytest.raises(
        UsageError, match=r"digits\.train_examples = 1198: expected at most the 1197"
    ):
        load("digits", train_examples=1198)


# ---------------------------------------------------------------- splits


@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=6),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_has_the_positions_of_scikit_learn(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(range(5, 5 + len(counts)), counts))
    held_out = max(1, int(share * len(labels)))
    options = {"test_size": held_out, "random_state": seed, "stratify": labels}
    try:
        theirs = train_test_split(range(len(labels)), **options)
    except ValueError:
        theirs = None
    if theirs is None:
        with pytest.raises(ValueError, match="each part needs at least"):
            stratified_split(labels, held_out, seed)
    else:
        kept, held = stratified_split(labels, held_out, seed)
        assert [kept.tolist(), held.tolist()] == theirs


def test_class_of_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="at least two images"):
        stratified_split(np.array([0, 0, 0, 1]), 2, 0)


@pytest.mark.parametrize(("seed", "test", "validation"), [(0, 400, 200), (7, 50, 333)])
def test_digits_are_those_of_scikit_learn(seed, test, validation):
    digits = load_digits()
    split = {"random_state": seed}
    rest, tested = train_test_split(range(1797), test_size=test, stratify=digits.target, **split)
    train, held = train_test_split(
        rest, test_size=validation, stratify=digits.target[rest], **split
    )
    splits = load("digits", split_seed=seed, test_examples=test, validation_examples=validation)
    for part, wanted in ((splits.train, train), (splits.validation, held), (splits.test, tested)):
        assert part.x_NCHW.dtype == torch.float32
        assert (part.x_NCHW.squeeze(1).numpy() == digits.images[wanted] / 16).all()
        assert part.y_N.tolist() == digits.target[wanted].tolist()
