"""SVHN: house numbers, 73,257 training and 26,032 test images of 32x32 pixels; no "extra" part.

Source: Netzer et al., "Reading digits in natural images with unsupervised feature learning", 2011.
"""

from typing import ClassVar

from robsparse.datasets import Splits, _torchvision
from robsparse.schema.imagesets import Augmentation, Description, Downloaded


class Params(Downloaded):
    """data_dir: where train_32x32.mat and test_32x32.mat are, or are downloaded to.

    Digits are not mirrored; `augmentation: {kind: shift, flip: true}` does, as the BCS authors do.
    """

    classes: ClassVar[int] = 10
    augmentation: Augmentation = Augmentation(kind="shift", flip=False)

    def description(self) -> Description:
        """Known without the images."""
        return self.described((3, 32, 32), self.classes, train=73_257, test=26_032)


def load(params: Params) -> Splits:
    """Labels are the digits 0 to 9; official test images in their order."""
    which = {"train": {"split": "train"}, "test": {"split": "test"}}
    return _torchvision.load("svhn", "SVHN", params, **which)
