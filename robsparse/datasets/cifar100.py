"""CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from typing import ClassVar

from robsparse.datasets import Splits, _torchvision
from robsparse.schema import Augmentation, Description, Downloaded


class Params(Downloaded):
    """data_dir: folder of cifar-100-python/ or its archive; missing data is downloaded to it."""

    classes: ClassVar[int] = 100
    augmentation: Augmentation = Augmentation(kind="shift", flip=True)

    def description(self) -> Description:
        """Return shape and sizes, which are known without the images."""
        return self.described((3, 32, 32), self.classes, train=50_000, test=10_000)


def load(params: Params) -> Splits:
    """Load the official test images in their order; split off validation from training images."""
    which = {"train": {"train": True}, "test": {"train": False}}
    return _torchvision.load("cifar100", "CIFAR100", params, **which)
