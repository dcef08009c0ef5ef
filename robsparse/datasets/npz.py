"""Your own images in one npz file: train_images, train_labels, test_images, test_labels.

Images are uint8 (0..255) or floats in [0,1], as N,H,W or N,H,W,C or N,C,H,W; labels are whole
numbers from 0. The evaluation attacks the test images in the order of the file. A file without
training images is enough to attack external models.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from robsparse.base.errors import UsageError
from robsparse.datasets import Part, Splits
from robsparse.datasets._arrays import as_part, read_npz, split_validation, test_only
from robsparse.schema import CONTENT, Description, Images, image_shape, shapes_in_npz

NEEDED = ("file",)  # parameters with a path that must exist
_ARRAYS = ("images", "labels")  # of each part


class Params(Images):
    """The file, and the images that are taken from its training images.

    file: path of the file.
    validation_examples: number taken from the training images.
    """

    file: Annotated[str, CONTENT]
    validation_examples: int = Field(1000, ge=10)
    classes: int | None = Field(
        None,
        ge=2,
        description="number of classes, if the labels do not show it; null: the largest label + 1",
    )

    def description(self) -> Description | None:
        """Return shape and sizes from the headers of the file, without the number of classes."""
        shapes = shapes_in_npz(self.file)
        train, test = shapes.get("train_images", ()), shapes.get("test_images", ())
        shape = image_shape(train or test)
        if not shape or not test:
            return None
        if not train:
            return Description(shape, self.classes, 0, 0, test[0])
        return self.described(shape, self.classes, train[0], test[0])


def load(params: Params) -> Splits:
    """Read the file.

    Raises:
        UsageError: if an array is missing or wrong.
    """
    path = Path(params.file)
    has_training = "train_images" in shapes_in_npz(params.file)
    parts = ("train", "test") if has_training else ("test",)
    stored = read_npz(path, tuple(f"{part}_{what}" for part in parts for what in _ARRAYS))
    if not has_training:
        test = _part(stored, "test", path, params.classes)
        return test_only(test, params.classes or int(test.y_N.max()) + 1)
    train = _part(stored, "train", path, params.classes)
    classes = params.classes or int(train.y_N.max()) + 1
    absent = sorted(set(range(classes)) - set(train.y_N.tolist()))
    if classes < 2 or absent:
        raise UsageError(
            f"{path}: expected training images of every class 0..{max(classes - 1, 1)}, found none "
            f"of {', '.join(map(str, absent or [1]))}"
        )
    test = _part(stored, "test", path, classes)
    if train.x_NCHW.shape[1:] != test.x_NCHW.shape[1:]:
        raise UsageError(
            f"{path}: training images are {tuple(train.x_NCHW.shape[1:])}, test images "
            f"{tuple(test.x_NCHW.shape[1:])} (channels, height, width); expected the same"
        )
    return Splits(*split_validation(train, params, "npz"), test, classes=classes)


def _part(stored: dict[str, np.ndarray], part: str, path: Path, classes: int | None) -> Part:
    word = {"train": "training", "test": "test"}[part]
    images, labels = (stored[f"{part}_{what}"] for what in _ARRAYS)
    return as_part(images, labels, f"{path}: {word} part", classes)
