"""Random shifts, crops and flips of whole batches, on the device that trains.

What happens to each image is drawn for a whole epoch at once, so that it depends neither on the
size of a batch nor on where an interrupted run goes on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robsparse.schema.imagesets import Augmentation


@dataclass(frozen=True)
class Draws:
    """One epoch's randomness of n images.

    offset_N2: (down, right) by which the image's content is looked up away from its place, in
    shares of the side (shift) or whole pixels (crop); flip_N: whether it is mirrored.
    """

    offset_N2: Tensor
    flip_N: Tensor

    def to(self, device: torch.device) -> "Draws":
        """The same draws on another device."""
        return Draws(self.offset_N2.to(device), self.flip_N.to(device))

    def __getitem__(self, index: Tensor) -> "Draws":
        return Draws(self.offset_N2[index], self.flip_N[index])


def draw(n: int, settings: Augmentation, generator: torch.Generator) -> Draws:
    """Draw what happens to n images. The generator is on the CPU, so all devices draw the same."""
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
    """The images x_NCHW in [0,1], each changed as drawn; the same tensor if nothing is to be."""
    if settings.kind == "shift":
        x_NCHW = _shifted(x_NCHW, draws.offset_N2)
    if settings.kind == "crop":
        x_NCHW = _cropped(x_NCHW, draws.offset_N2, settings.padding)
    if settings.flip:
        x_NCHW = torch.where(draws.flip_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)
    return x_NCHW


def _shifted(x_NCHW: Tensor, offset_N2: Tensor) -> Tensor:
    """Pixel (i, j) becomes the bilinear sample at (i + down, j + right), edges repeated."""
    # With aligned corners 0 off, a grid's coordinates of -1 and 1 are the outer edges of the
    # corner pixels: one side is 2 long, so a share of the side is twice that in the grid.
    theta = torch.eye(2, 3, device=x_NCHW.device, dtype=x_NCHW.dtype).repeat(len(x_NCHW), 1, 1)
    theta[:, :, 2] = 2 * offset_N2.flip(1).to(x_NCHW.dtype)  # the grid wants (right, down)
    grid = functional.affine_grid(theta, list(x_NCHW.shape), align_corners=False)
    moved = functional.grid_sample(
        x_NCHW, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.clamp(0, 1)  # interpolation may round to just above 1


def _cropped(x_NCHW: Tensor, offset_N2: Tensor, padding: int) -> Tensor:
    """The window of the old size in the padded image, moved by whole pixels from its middle."""
    height, width = x_NCHW.shape[2:]
    padded = functional.pad(x_NCHW, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # N, C, top, left, height, width
    top, left = (offset_N2 + padding).unbind(1)
    return windows[torch.arange(len(x_NCHW), device=top.device), :, top, left]
