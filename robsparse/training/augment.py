"""Random shifts, crops and flips of whole batches, on the training device.

The random numbers of a whole epoch are drawn at once. They depend neither on the size of a batch
nor on the step at which an interrupted run is resumed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robsparse.schema.imagesets import Augmentation


@dataclass(frozen=True)
class Draws:
    """The random shift and flip of each of n images in one epoch.

    offset_N2: the offset (down, right) of each image. A pixel gets the value of the image at its
        position plus this offset. The unit is the side (shift) or one pixel (crop).
    flip_N: whether the image is mirrored.
    """

    offset_N2: Tensor
    flip_N: Tensor

    def to(self, device: torch.device) -> "Draws":
        """Return the same draws on another device."""
        return Draws(self.offset_N2.to(device), self.flip_N.to(device))

    def __getitem__(self, index: Tensor) -> "Draws":
        return Draws(self.offset_N2[index], self.flip_N[index])


def draw(n: int, settings: Augmentation, generator: torch.Generator) -> Draws:
    """Draw for n images. The generator is on the CPU, so the draws do not depend on the device."""
    offset_N2, flip_N = torch.zeros(n, 2), torch.zeros(n, dtype=torch.bool)
    if settings.kind == "shift":
        offset_N2 = settings.shift * (2 * torch.rand(n, 2, generator=generator) - 1)
    if settings.kind == "crop":
        width = 2 * settings.padding + 1
        offset_N2 = torch.randint(width, (n, 2), generator=generator) - settings.padding
    if settings.flip:
        flip_N = torch.rand(n, generator=generator) < 0.5
    return Draws(offset_N2, flip_N)


def apply(x_NCHW: Tensor, draws: Draws, settings: Augmentation) -> Tensor:
    """Return the images x_NCHW in [0,1] after the drawn shifts, crops and flips."""
    if settings.kind == "shift":
        x_NCHW = _shifted(x_NCHW, draws.offset_N2)
    if settings.kind == "crop":
        x_NCHW = _cropped(x_NCHW, draws.offset_N2, settings.padding)
    if settings.flip:
        x_NCHW = torch.where(draws.flip_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)
    return x_NCHW


def _shifted(x_NCHW: Tensor, offset_N2: Tensor) -> Tensor:
    """Return images with bilinear samples at (i + down, j + right). Edge pixels are repeated."""
    # Without align_corners, the coordinates -1 and 1 of a grid are the outer edges of the corner
    # pixels. A side has length 2, so a share of the side is twice that share in the grid.
    theta = torch.eye(2, 3, device=x_NCHW.device, dtype=x_NCHW.dtype).repeat(len(x_NCHW), 1, 1)
    theta[:, :, 2] = 2 * offset_N2.flip(1).to(x_NCHW.dtype)  # the order of a grid is (right, down)
    grid = functional.affine_grid(theta, list(x_NCHW.shape), align_corners=False)
    moved = functional.grid_sample(
        x_NCHW, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.clamp(0, 1)  # interpolation may give a value just above 1 by rounding


def _cropped(x_NCHW: Tensor, offset_N2: Tensor, padding: int) -> Tensor:
    """Return a window of the old size in each padded image, shifted by whole pixels."""
    height, width = x_NCHW.shape[2:]
    padded = functional.pad(x_NCHW, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N, C, top, left, height, width
    top, left = (offset_N2 + padding).unbind(1)
    return windows[torch.arange(len(x_NCHW), device=top.device), :, top, left]
