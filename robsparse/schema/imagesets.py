"""Settings that image data sets share, and what is known of one before it is read.

No torch in here.
"""

import ast
import zipfile
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from robsparse.schema.fields import PLACE, Strict


class Augmentation(Strict):
    """How training images are varied, anew in each epoch.

    kind: "shift" moves the image by a real number of pixels, uniform in +-shift of the side in
    each direction, with bilinear interpolation and repeated edges (as the BCS authors do); "crop"
    pads with `padding` zeros and cuts the old size out at a random place.
    flip: mirror the image left to right with probability 1/2.
    """

    kind: Literal["none", "shift", "crop"] = "none"
    flip: bool = False
    shift: float = Field(0.1, gt=0, le=0.5, description="largest shift, as a share of the side")
    padding: PositiveInt = Field(4, description="zeros that a crop adds on each side, in pixels")


@dataclass(frozen=True)
class Description:
    """What is known of a data set: channels, height and width; classes; images of each part.

    classes: None if only the labels tell.
    """

    image_shape: tuple[int, int, int]
    classes: int | None
    train_examples: int
    validation_examples: int
    test_examples: int


class Images(Strict):
    """What every data set with a training and a test part of its own has.

    validation_examples: held out of the training images, stratified by class.
    train_on_validation: networks are trained on all training images, also on those that validation
        measures. The selections `best_val` and `best_clean` are then made on images that the
        network knows; `last` needs no selection.
    """

    validation_examples: int = Field(2000, ge=10)
    train_on_validation: bool = False
    split_seed: NonNegativeInt = 0
    augmentation: Augmentation = Augmentation()

    def description(self) -> Description | None:
        """What is known before the images are read, or None."""
        return None

    def described(
        self, image_shape: tuple[int, int, int], classes: int | None, train: int, test: int
    ) -> Description:
        """Of a data set of so many training images, of which some are held out, and test images."""
        held_out = self.validation_examples
        trained = train if self.train_on_validation else train - held_out
        return Description(image_shape, classes, trained, held_out, test)


class Downloaded(Images):
    """A data set that torchvision downloads. data_dir: where it is, or is downloaded to."""

    classes: ClassVar[int]

    data_dir: Annotated[str, PLACE] = "data"
    validation_examples: int = Field(2000, ge=10, le=25000)


def shapes_in_npz(path: str) -> dict[str, tuple[int, ...]]:
    """The shape of each array of an npz file, from the headers alone; none of a damaged file."""
    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as handle:
                    start = handle.read(8)  # the magic word and the version of the format
                    size = int.from_bytes(handle.read(2 if start[6] == 1 else 4), "little")
                    header = ast.literal_eval(handle.read(min(size, 10_000)).decode("latin-1"))
                shapes[name.removesuffix(".npy")] = tuple(header["shape"])
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, SyntaxError, LookupError, TypeError):
        return {}
    return shapes


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Channels, height and width of an array of images N,H,W or N,H,W,C or N,C,H,W; else None."""
    if len(shape) == 3:
        return 1, *shape[1:]
    if len(shape) == 4 and (shape[3] in (1, 3)) != (shape[1] in (1, 3)):
        return (shape[3], *shape[1:3]) if shape[3] in (1, 3) else shape[1:]
    return None
