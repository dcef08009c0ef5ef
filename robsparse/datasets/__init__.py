"""Data sets, one file each: images as float32 x_NCHW in [0,1], labels as int64 y_N.

Every split is fixed by the data set's own seed, never by the seed of a run, so that all methods
and seeds are selected on the same validation images and tested on the same test images.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from robsparse.base import registry
from robsparse.schema import Strict
from robsparse.schema.imagesets import Description


@dataclass(frozen=True)
class Part:
    """Images x_NCHW in [0,1] and labels y_N in 0..classes-1."""

    x_NCHW: Tensor
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.y_N)

    def to(self, device: torch.device) -> "Part":
        """The same images on another device."""
        return Part(self.x_NCHW.to(device), self.y_N.to(device))


@dataclass(frozen=True)
class Splits:
    """Disjoint training, validation and test images. Training code is never handed `test`."""

    train: Part
    validation: Part
    test: Part
    classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.x_NCHW.shape[1:]
        return channels, height, width

    def checksum(self) -> str:
        """SHA-256 over all images and labels, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            digest.update(part.x_NCHW.contiguous().numpy().tobytes())
            digest.update(part.y_N.numpy().tobytes())
        return digest.hexdigest()[:16]


def describe(name: str, params: Strict) -> Description:
    """Shape and sizes of a data set; it is only loaded where they are not known in advance."""
    known = params.description() if hasattr(params, "description") else None
    if known is not None and known.classes is not None:
        return known
    splits = load(name, params)
    parts = splits.train, splits.validation, splits.test
    return Description(splits.image_shape, splits.classes, *map(len, parts))


def load(name: str, params: Strict) -> Splits:
    """The fixed splits of a registered data set."""
    return registry.load("dataset", name).load(params)
