"""PreActResNet-18 for 32x32 images: a 3x3 first convolution of stride 1, no max-pool.

Batch norm and activation come before each convolution of a block. The first convolution of the
network has neither before it; the last block has both after it.

Source: He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016), figure 1 (b); widths
and depths of ResNet-18 (He et al., CVPR 2016).

Differs from the paper: the shortcut of the first block takes the result of the first convolution
before batch norm and activation, as in the other blocks and in wide residual networks.
Some published PreActResNet-18 have no batch norm and activation after the last block. Their weights
are refused, because tensors are missing.
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

NAMES = ("preactresnet18",)
SMALLEST = 8  # pixels a side of the images


class Params(Residual):
    """The padding, the activation and the normalisation of the images."""


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build conv1, stage1..stage4 (widths 64, 128, 256, 512), BN, activation, mean, classifier.

    x_NCHW in [0,1] -> logits_NK. Each stage has two blocks. Stages 2 to 4 halve the map and round
    up. The mean is over the whole map.

    Raises:
        UsageError: if a side of the images is below 8 pixels, or as `network` does.
    """
    require_size(name, image_shape, SMALLEST)
    channels = 64
    layers: dict[str, nn.Module] = {"conv1": conv3x3(image_shape[0], channels)}
    for number in (1, 2, 3, 4):
        width, stride = 32 * 2**number, 1 if number == 1 else 2
        layers[f"stage{number}"] = stage(
            PreActivationBlock, channels, width, depth=2, stride=stride, params=params
        )
        channels = width
    layers |= {"bn1": nn.BatchNorm2d(channels), "relu": MODULES[params.activation]()}
    return network(name, params, image_shape[0], layers | mean_and_classify(channels, classes))
