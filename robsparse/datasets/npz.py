"""Your own images in one npz file: train_images, train_labels, test_images, test_labels.

Images are uint8 (0..255) or floats in [0,1], as N,H,W or N,H,W,C or N,C,H,W; labels are whole
numbers from 0. The evaluation attacks the test images in the order of the file.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from robsparse.base.errors import UsageError
from robsparse.datasets import Splits
from robsparse.datasets._arrays import as_part, read_npz, split_validation
from robsparse.schema import CONTENT, Description, Images, image_shape, shapes_in_npz

NEEDED = ("file",)  # parameters with a path that must exist


class Params(Images):
    """file: path of the file. validation_examples: number taken from the training images."""

    file: Annotated[str, CONTENT]
    validation_examples: int = Field(1000, ge=10)

    def description(self) -> Description | None:
        """Return shape and sizes from the headers of the file, without the number of classes."""
        shapes = shapes_in_npz(self.file)
        train, test = shapes.get("train_images", ()), shapes.get("test_images", ())
        shape = image_shape(train)
        return (shape and test and self.described(shape, None, train[0], test[0])) or None


def load(params: Params) -> Splits:
    """Read the file.

    Raises:
        UsageError: if an array is missing or wrong.
    """
    path = Path(params.file)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    stored = read_npz(path, names)
    train = as_part(stored["train_images"], stored["train_labels"], f"{path}: training part")
    classes = int(train.y_N.max()) + 1
    absent = sorted(set(range(classes)) - set(train.y_N.tolist()))
    if classes < 2 or absent:
        raise UsageError(
            f"{path}: expected training images of every class 0..{max(classes - 1, 1)}, found none "
            f"of {', '.join(map(str, absent or [1]))}"
        )
    test = as_part(stored["test_images"], stored["test_labels"], f"{path}: test part", classes)
    if train.x_NCHW.shape[1:] != test.x_NCHW.shape[1:]:
        raise UsageError(
            f"{path}: training images are {tuple(train.x_NCHW.shape[1:])}, test images "
            f"{tuple(test.x_NCHW.shape[1:])} (channels, height, width); expected the same"
        )
    return Splits(*split_validation(train, params, "npz"), test, classes=classes)
