"""Converts arrays to images, checks them, and splits off the validation images."""

from pathlib import Path

import numpy as np
import torch

from robsparse.base.errors import UsageError, one_line
from robsparse.datasets import Part, Splits
from robsparse.schema import Images
from robsparse.schema.imagesets import shapes_in_npz


def split_validation(part: Part, params: Images, name: str) -> tuple[Part, Part]:
    """Split images into training and validation images, stratified by class.

    With `train_on_validation` the training images are all of them; with `train_examples` only some
    of the others. The images are drawn in a random order, so the first ones are a fair sample.

    Args:
        part: the images to split.
        params: numbers of validation and training images, and the seed that draws them.
        name: of the data set, for messages.

    Raises:
        UsageError: if there are too few images.
    """
    try:
        train, validation = stratified_split(
            part.y_N.numpy(), params.validation_examples, params.split_seed
        )
    except ValueError as error:
        raise UsageError(
            f"datasets.{name}.validation_examples = {params.validation_examples}: cannot split "
            f"{len(part)} training images like this ({error})"
        ) from None
    wanted = params.train_examples
    if wanted is not None and wanted > len(train):
        raise UsageError(
            f"datasets.{name}.train_examples = {wanted}: expected at most the {len(train)} images "
            "that are not held out"
        )
    kept, held = torch.tensor(train[:wanted]), torch.tensor(validation)
    if params.train_on_validation:
        kept = torch.arange(len(part))
    return Part(part.x_NCHW[kept], part.y_N[kept]), Part(part.x_NCHW[held], part.y_N[held])


def stratified_split(
    labels_N: np.ndarray, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `held_out` images, such that every class has the same share in both parts.

    Args:
        labels_N: the class of each image.
        held_out: number of images of the second part.
        seed: of the random numbers.

    Returns:
        Positions of the other images and of the held-out images, each in a random order.

    Raises:
        ValueError: if a class has one image only, or if a part is smaller than the number of
            classes.

    Source: `train_test_split` of scikit-learn with `stratify`, which returns the same positions for
    the same seed. It is not called because its import takes a second in every job.
    """
    random = np.random.RandomState(seed)
    members = [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]
    counts = np.array([len(positions) for positions in members])
    smaller = min(held_out, len(labels_N) - held_out)
    if counts.min() < 2:
        raise ValueError("every class needs at least two images")
    if smaller < len(members):
        raise ValueError(f"each part needs at least {len(members)} images, one of each class")
    kept_of_class = _shares(counts, len(labels_N) - held_out, random)
    held_of_class = _shares(counts - kept_of_class, held_out, random)
    kept, held = [], []
    for positions, first, second in zip(members, kept_of_class, held_of_class, strict=True):
        drawn = positions[random.permutation(len(positions))]
        kept.append(drawn[:first])
        held.append(drawn[first : first + second])
    return random.permutation(np.concatenate(kept)), random.permutation(np.concatenate(held))


def _shares(counts: np.ndarray, total: int, random: np.random.RandomState) -> np.ndarray:
    """Split a total in proportion to the counts. Largest remainders round up; ties are drawn."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    remainders = exact - shares
    missing = int(total - shares.sum())
    for value in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        ties = np.flatnonzero(remainders == value)
        drawn = random.choice(ties, min(len(ties), missing), replace=False)
        shares[drawn] += 1
        missing -= len(drawn)
    return shares.astype(int)


def test_only(test: Part, classes: int) -> Splits:
    """Return splits with these test images, whose training and validation parts are empty."""
    none = Part(test.x_NCHW[:0], test.y_N[:0])
    return Splits(none, none, test, classes)


def shuffled(part: Part) -> Part:
    """Return the same images in another order, which is always the same for their number."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    return Part(part.x_NCHW[order], part.y_N[order])


def as_part(images: np.ndarray, labels: np.ndarray, where: str, classes: int | None = None) -> Part:
    """Convert images and labels to float32 x_NCHW in [0,1] and int64 y_N.

    Args:
        images: uint8 0..255 or floats in [0,1], as N,H,W or N,H,W,C or N,C,H,W with C of 1 or 3.
        labels: integers from 0, one for each image.
        where: start of error messages, e.g. the path of the file.
        classes: number of classes, if it is known; labels are below it.

    Raises:
        UsageError: if an array has another shape, type or range.
    """
    x_NCHW = _channels_first(images, where)
    if x_NCHW.dtype == np.uint8:
        pixels = torch.from_numpy(np.ascontiguousarray(x_NCHW)).float() / 255
    elif x_NCHW.dtype.kind == "f":
        _check_range(x_NCHW, where)
        pixels = torch.from_numpy(np.ascontiguousarray(x_NCHW, dtype=np.float32))
    else:
        raise UsageError(
            f"{where}: expected uint8 images or floats in [0, 1], found {x_NCHW.dtype}"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UsageError(
            f"{where}: expected labels as whole numbers, one for each image, found {labels.dtype} "
            f"of shape {labels.shape}"
        )
    if len(labels) != len(pixels):
        raise UsageError(f"{where}: found {len(pixels)} images but {len(labels)} labels")
    if not len(labels):
        raise UsageError(f"{where}: found no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        upper = f"..{classes - 1}" if classes is not None else " upwards"
        raise UsageError(f"{where}: expected labels 0{upper}, found {low}..{high}")
    return Part(pixels, torch.from_numpy(labels.astype(np.int64)))


def _check_range(images: np.ndarray, where: str) -> None:
    if not np.isfinite(images).all():
        raise UsageError(f"{where}: expected floats in [0, 1], found NaN or infinite values")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        hint = "; save 0..255 as uint8, or divide by 255" if 1 < high <= 255 and low >= 0 else ""
        raise UsageError(f"{where}: expected floats in [0, 1], found [{low:g}, {high:g}]{hint}")


def _channels_first(images: np.ndarray, where: str) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and (images.shape[3] in (1, 3)) != (images.shape[1] in (1, 3)):
        return images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3) else images
    raise UsageError(
        f"{where}: expected images as N,H,W or N,H,W,C or N,C,H,W with 1 or 3 channels, found "
        f"shape {images.shape}"
    )


def read_npz(path: Path, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read some arrays of an npz file. Nothing is unpickled.

    Raises:
        UsageError: if the file is missing or damaged, or if it lacks one of the arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in wanted:
                if name not in stored:
                    raise UsageError(
                        f"{path}: no array '{name}', expected {', '.join(wanted)}, found "
                        f"{', '.join(stored.files)}"
                    )
            return {name: stored[name] for name in wanted}
    except UsageError:
        raise
    except ValueError:
        raise UsageError(
            f"{path}: expected plain arrays of numbers, found Python objects, which are never "
            "unpickled"
        ) from None
    except Exception as error:  # of many kinds, if the bytes are random
        raise UsageError(f"{path}: not a readable npz file ({one_line(error)})") from None


def read_extra(path: Path, image_shape: tuple[int, int, int], classes: int) -> Part:
    """Read further training images from an npz file: pseudo-labelled or synthetic ones.

    Args:
        path: the file, with the arrays `image` and `label`, or `images` and `labels`.
        image_shape: channels, height and width of the data set's images.
        classes: number of classes of the data set.

    Raises:
        UsageError: if the file is not readable or does not fit the data set.
    """
    images, labels = "images", "labels"
    if {"image", "label"} <= shapes_in_npz(str(path)).keys():  # as published files have it
        images, labels = "image", "label"
    stored = read_npz(path, (images, labels))
    part = as_part(stored[images], stored[labels], str(path), classes)
    if part.x_NCHW.shape[1:] != image_shape:
        raise UsageError(
            f"{path}: expected images of {'x'.join(map(str, image_shape))} (channels, height, "
            f"width) as in the data set, found {'x'.join(map(str, part.x_NCHW.shape[1:]))}"
        )
    return part
