"""Data sets, one file each: images as float32 x_NCHW in [0,1], labels as int64 y_N.

The seed of a data set decides its splits; the seed of a run does not. All methods and seeds
therefore use the same validation images and the same test images.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from robsparse.base import registry
from robsparse.schema import Description, Strict


@dataclass(frozen=True)
class Part:
    """Images x_NCHW in [0,1] and labels y_N in 0..classes-1."""

    x_NCHW: Tensor
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.y_N)

    def to(self, device: torch.device) -> "Part":
        """Return the same images and labels on another device."""
        return Part(self.x_NCHW.to(device), self.y_N.to(device))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images. Training code never receives `test`.

    They are disjoint, unless a data set also trains on its validation images. Data with test images
    only has empty training and validation parts.
    """

    train: Part
    validation: Part
    test: Part
    classes: int

    def some_images(self, n: int) -> Tensor:
        """Return x_NCHW with the first n training images, or test images if there are no others."""
        return (self.train if len(self.train) else self.test).x_NCHW[:n]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.x_NCHW.shape[1:]
        return channels, height, width

    def checksum(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of all images and labels, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(part.x_NCHW.contiguous().numpy().tobytes())
            digest.update(part.y_N.numpy().tobytes())
        return digest.hexdigest()[:16]


def describe(name: str, params: Strict) -> Description:
    """Return the image shape and the sizes of a data set.

    The data set is loaded only if they are not known without it.
    """
    known = params.description() if hasattr(params, "description") else None
    if known is not None and known.classes is not None:
        return known
    splits = load(name, params)
    parts = splits.train, splits.validation, splits.test
    return Description(splits.image_shape, splits.classes, *map(len, parts))


def load(name: str, params: Strict) -> Splits:
    """Load the splits of a registered data set."""
    return registry.load("dataset", name).load(params)
