"""Wide residual networks WRN-28-2, 28-4, 28-10 and 34-10: pre-activation blocks, no dropout.

Source: the BCS authors' repository (IGITUGraz/SparseAdversarialTraining), behaviour of
models/sparse_wideresnet.py; design of Zagoruyko and Komodakis (BMVC 2016), table 1.

Differs from the BCS authors' code:
- the padding of convolutions of stride 2 (`padding: tensorflow` is theirs);
- the running variance of batch norm: PyTorch uses the unbiased variance, TensorFlow the biased one;
- the last mean is over the whole map for images of any size.
"""

from torch import nn

from robsparse.models._layers import (
    MODULES,
    PreActivationBlock,
    conv3x3,
    mean_and_classify,
    network,
    require_size,
    stage,
)
from robsparse.schema import Residual

NAMES = ("wrn28_2", "wrn28_4", "wrn28_10", "wrn34_10")
SMALLEST = 4  # pixels a side of the images


class Params(Residual):
    """The padding, the activation and the normalisation of the images."""


# Depth (number of all convolutions, with the three of the shortcuts) and widening factor k.
SIZES = {"wrn28_2": (28, 2), "wrn28_4": (28, 4), "wrn28_10": (28, 10), "wrn34_10": (34, 10)}


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build conv1, block1..block3 of 16k, 32k, 64k channels, BN, activation, mean, classifier.

    x_NCHW in [0,1] -> logits_NK. Blocks 2 and 3 halve the map and round up.

    Raises:
        UsageError: if a side of the images is below 4 pixels, or as `network` does.
    """
    require_size(name, image_shape, SMALLEST)
    depth, factor = SIZES[name]
    channels = 16
    layers: dict[str, nn.Module] = {"conv1": conv3x3(image_shape[0], channels)}
    for number in (1, 2, 3):
        width, stride = 8 * 2**number * factor, 1 if number == 1 else 2
        layers[f"block{number}"] = stage(
            PreActivationBlock,
            channels,
            width,
            depth=(depth - 4) // 6,
            stride=stride,
            params=params,
        )
        channels = width
    layers |= {"bn1": nn.BatchNorm2d(channels), "relu": MODULES[params.activation]()}
    return network(name, params, image_shape[0], layers | mean_and_classify(channels, classes))
