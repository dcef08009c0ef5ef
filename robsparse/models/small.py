"""Small convolutional network with batch norm, for studies that run on a laptop."""

import torch
from pydantic import PositiveInt
from torch import nn

from robsparse.config import Strict
from robsparse.errors import UsageError

NAMES = ("small_cnn",)


class Params(Strict):
    """width: channels of the first convolution; the later ones have 2 and 4 times as many."""

    width: PositiveInt = 16


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three 3x3 convolutions (strides 1, 2, 2) with BN and ReLU, 2x2 mean pool, one linear layer.

    Weights start from a truncated normal of variance 2 / fan_in, biases from 0.
    Raises UsageError for images smaller than 5 pixels a side.
    """
    channels, height, width = image_shape
    if min(height, width) < 5:
        raise UsageError(f"{name}: expected images of at least 5x5 pixels, found {height}x{width}")
    layers: list[nn.Module] = []
    for out, stride in ((params.width, 1), (2 * params.width, 2), (4 * params.width, 2)):
        layers += [
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
        channels = out
    # Two halvings leave 2x2 of 8x8 pixels: nothing to pool, and torch's pooling is slow at it.
    if (-(-height // 4), -(-width // 4)) != (2, 2):
        layers.append(nn.AdaptiveAvgPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, classes))
    model.apply(he_truncated_normal)
    return model


def he_truncated_normal(module: nn.Module) -> None:
    """Initialise one layer as He et al. (2015) do, from a normal cut at two standard deviations."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        fan_in = module.weight[0].numel()
        # Cutting at 2 sigma leaves this share of the standard deviation.
        std = (2 / fan_in) ** 0.5 / 0.87962566103423978
        with torch.no_grad():
            nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
            if module.bias is not None:
                module.bias.zero_()
