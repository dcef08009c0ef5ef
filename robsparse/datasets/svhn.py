"""SVHN: house numbers, 73,257 training and 26,032 test images of 32x32 pixels.

The additional images of the part "extra" are not used.

Source: Netzer et al., "Reading digits in natural images with unsupervised feature learning", 2011.
"""

from typing import ClassVar

from robsparse.datasets import Splits, _torchvision
from robsparse.schema import Augmentation, Description, Downloaded


class Params(Downloaded):
    """data_dir: folder of train_32x32.mat and test_32x32.mat; missing files are downloaded to it.

    The default augmentation does not mirror images, because mirrored digits are wrong. The BCS
    authors mirror them: `augmentation: {kind: shift, flip: true}`.
    """

    classes: ClassVar[int] = 10
    augmentation: Augmentation = Augmentation(kind="shift", flip=False)

    def description(self) -> Description:
        """Return shape and sizes, which are known without the images."""
        return self.described((3, 32, 32), self.classes, train=73_257, test=26_032)


def load(params: Params) -> Splits:
    """Load the official test images in their order; split off validation from training images.

    The labels are the digits 0 to 9.
    """
    which = {"train": {"split": "train"}, "test": {"split": "test"}}
    return _torchvision.load("svhn", "SVHN", params, **which)
