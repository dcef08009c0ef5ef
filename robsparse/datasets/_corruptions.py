"""Common corruptions that are generated from any images, at five severities.

They are of the kinds of Hendrycks and Dietterich (ICLR 2019), with severities of this suite.
Lengths are shares of the side of the image, so that images of every size are corrupted in a similar
way. They are not the images of CIFAR-10-C.

Every function maps x_NCHW in [0,1], a severity in 1..5 and a generator to x_NCHW, which the caller
clips to [0,1] and rounds to 8 bits.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Random = np.random.Generator


def gaussian_noise(x: Tensor, severity: int, random: Random) -> Tensor:
    """Add normal noise of standard deviation 0.04 to 0.2."""
    return x + 0.04 * severity * _tensor(random.standard_normal(x.shape))


def shot_noise(x: Tensor, severity: int, random: Random) -> Tensor:
    """Draw the number of photons of each pixel: 200 to 12 at full brightness."""
    photons = (200, 100, 50, 25, 12)[severity - 1]
    return _tensor(random.poisson(x.double().numpy() * photons) / photons)


def impulse_noise(x: Tensor, severity: int, random: Random) -> Tensor:
    """Set 2 to 18 % of the values to 0 or 1, both with the same probability."""
    share = (0.02, 0.05, 0.08, 0.12, 0.18)[severity - 1]
    hit = torch.from_numpy(random.random(x.shape) < share)
    return torch.where(hit, _tensor(random.integers(0, 2, x.shape)), x)


def defocus_blur(x: Tensor, severity: int, random: Random) -> Tensor:
    """Average over a disk of a radius of half a pixel plus 2 to 10 % of the side."""
    radius = 0.5 + 0.02 * severity * min(x.shape[2:])
    reach = math.ceil(radius)
    # The share of each pixel that the disk covers, on a grid of 9x9 points for each pixel.
    points = (np.arange(9 * (2 * reach + 1)) - 4) / 9 - reach
    inside = np.hypot(points[:, None], points) <= radius
    disk = inside.reshape(2 * reach + 1, 9, 2 * reach + 1, 9).mean((1, 3))
    return _convolved(x, _tensor(disk / disk.sum()))


def motion_blur(x: Tensor, severity: int, random: Random) -> Tensor:
    """Average along a line of 6 to 30 % of the side, in a direction drawn for each image."""
    length = 0.06 * severity * min(x.shape[2:])
    angle = _tensor(random.uniform(0, math.pi, len(x)))
    steps = 2 * math.ceil(length) + 1
    places = torch.linspace(-length / 2, length / 2, steps)
    moved = [_shifted(x, t * angle.sin(), t * angle.cos()) for t in places]
    return torch.stack(moved).mean(0)


def fog(x: Tensor, severity: int, random: Random) -> Tensor:
    """Mix 20 to 60 % of a bright smooth random field into each image."""
    # Loaded here because its import is slow and few studies measure corruptions.
    from scipy.ndimage import gaussian_filter  # noqa: PLC0415

    share, (height, width) = 0.1 + 0.1 * severity, x.shape[2:]
    noise = random.standard_normal((len(x), height, width))
    smooth = gaussian_filter(noise, (0, height / 6, width / 6), mode="wrap")
    low, high = smooth.min((1, 2), keepdims=True), smooth.max((1, 2), keepdims=True)
    field = 0.6 + 0.4 * (smooth - low) / np.maximum(high - low, 1e-12)
    return (1 - share) * x + share * _tensor(field)[:, None]


def brightness(x: Tensor, severity: int, random: Random) -> Tensor:
    """Add 0.1 to 0.5 to every value."""
    return x + 0.1 * severity


def contrast(x: Tensor, severity: int, random: Random) -> Tensor:
    """Shrink the distances from the mean of each channel of each image to 75 to 15 %."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.9 - 0.15 * severity) * (x - mean)


def pixelate(x: Tensor, severity: int, random: Random) -> Tensor:
    """Average over blocks: the image has 80 to 30 % of its pixels a side left."""
    share = (0.8, 0.65, 0.5, 0.4, 0.3)[severity - 1]
    height, width = (max(1, round(share * side)) for side in x.shape[2:])
    small = functional.interpolate(x, (height, width), mode="area")
    return functional.interpolate(small, tuple(x.shape[2:]), mode="nearest")


def jpeg_compression(x: Tensor, severity: int, random: Random) -> Tensor:
    """Compress as JPEG of quality 80 to 15; each channel by itself unless there are three."""
    quality = (80, 60, 40, 25, 15)[severity - 1]
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    if x.shape[1] == 3:
        found = np.stack([_compressed(image, quality) for image in pixels])
    else:
        found = np.stack(
            [
                np.stack([_compressed(channel, quality) for channel in np.moveaxis(image, 2, 0)], 2)
                for image in pixels
            ]
        )
    return _tensor(found).permute(0, 3, 1, 2) / 255


def _compressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Return an image H,W or H,W,3 (uint8) as JPEG gives it back."""
    memory = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(memory, "JPEG", quality=quality)
    return np.asarray(Image.open(memory))


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Return each channel convolved with a square kernel of odd size; edges are repeated."""
    reach, channels = len(kernel) // 2, x.shape[1]
    padded = functional.pad(x, (reach,) * 4, mode="replicate")
    weight = kernel.expand(channels, 1, -1, -1).contiguous()
    return functional.conv2d(padded, weight, groups=channels)


def _shifted(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Return each image moved by (float N) pixels, bilinearly; edges are repeated."""
    height, width = x.shape[2:]
    moves = torch.eye(2, 3).repeat(len(x), 1, 1)
    moves[:, 0, 2], moves[:, 1, 2] = -2 * right / width, -2 * down / height
    grid = functional.affine_grid(moves, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


GENERATED: dict[str, Callable[[Tensor, int, Random], Tensor]] = {
    corrupt.__name__: corrupt
    for corrupt in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        motion_blur,
        fog,
        brightness,
        contrast,
        pixelate,
        jpeg_compression,
    )
}
