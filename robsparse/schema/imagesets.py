"""Settings that all image data sets have, and their sizes before the images are read.

Imports no torch.
"""

import ast
import zipfile
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.fields import PLACE, Strict


class Augmentation(Strict):
    """Random changes of the training images; drawn again in each epoch.

    kind: "shift" moves the image in each direction by a random real number of pixels, uniform in
        +-shift times the side, with bilinear interpolation and repeated edges (as the BCS authors
        do). "crop" pads with `padding` zeros and cuts out the old size at a random position.
    flip: mirror the image left to right with probability 1/2.
    """

    kind: Literal["none", "shift", "crop"] = "none"
    flip: bool = False
    shift: float = Field(0.1, gt=0, le=0.5, description="largest shift, as a share of the side")
    padding: PositiveInt = Field(4, description="zeros that a crop adds on each side, in pixels")


@dataclass(frozen=True)
class Description:
    """Sizes of a data set.

    image_shape: channels, height, width.
    classes: number of classes; None if the labels must be read to know it.
    train_examples, validation_examples, test_examples: number of images of each part.
    """

    image_shape: tuple[int, int, int]
    classes: int | None
    train_examples: int
    validation_examples: int
    test_examples: int


class Images(Strict):
    """Settings of every data set that has a training part and a test part.

    split_seed: random numbers of the splits; the seed of a network does not decide them.
    augmentation: random changes of the training images.
    validation_examples: number of training images that are held out, stratified by class.
    train_on_validation: whether networks are trained on all training images, also on the held-out
        ones. The selections `best_val` and `best_clean` are then made on images of the training;
        `last` needs no selection.
    train_examples: number of training images that are used, drawn with `split_seed` from those that
        are not held out; null: all of them.
    """

    validation_examples: int = Field(2000, ge=10)
    train_on_validation: bool = False
    train_examples: PositiveInt | None = None
    split_seed: NonNegativeInt = 0
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _trains_on_all_or_some(self) -> "Images":
        if self.train_on_validation and self.train_examples is not None:
            raise PydanticCustomError(
                "train_examples",
                "expected null beside train_on_validation, which trains on all images",
                {"key": "train_examples"},
            )
        return self

    def description(self) -> Description | None:
        """Sizes that are known before the images are read, or None."""
        return None

    def described(
        self, image_shape: tuple[int, int, int], classes: int | None, train: int, test: int
    ) -> Description:
        """Make a description; `train` counts all training images, with those held out."""
        held_out = self.validation_examples
        trained = train if self.train_on_validation else train - held_out
        trained = min(trained, self.train_examples or trained)
        return Description(image_shape, classes, trained, held_out, test)


class Downloaded(Images):
    """A data set that torchvision downloads. data_dir: the folder that has it or will have it."""

    classes: ClassVar[int]

    data_dir: Annotated[str, PLACE] = "data"
    validation_examples: int = Field(2000, ge=10, le=25000)


def shapes_in_npz(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an npz file; reads only the headers. Empty for a damaged file."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as handle:
                    start = handle.read(8)  # magic bytes and version of the format
                    size = int.from_bytes(handle.read(2 if start[6] == 1 else 4), "little")
                    header = ast.literal_eval(handle.read(min(size, 10_000)).decode("latin-1"))
                shapes[name.removesuffix(".npy")] = tuple(header["shape"])
    except Exception:  # of many kinds, if the bytes are random
        return {}
    return shapes


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Channels, height and width from the shape N,H,W or N,H,W,C or N,C,H,W; None for others."""
    if len(shape) == 3:
        return 1, *shape[1:]
    if len(shape) == 4 and (shape[3] in (1, 3)) != (shape[1] in (1, 3)):
        return (shape[3], *shape[1:3]) if shape[3] in (1, 3) else shape[1:]
    return None
