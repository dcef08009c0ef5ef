"""ResNet-18, 34 and 50 for 32x32 images: a 3x3 first convolution of stride 1, no max-pool.

Source: the BCS authors' repository (IGITUGraz/SparseAdversarialTraining), behaviour of
models/sparse_resnet.py.

Differs from the authors' code:
- the padding of convolutions of stride 2 (`padding: tensorflow` is theirs);
- the running variance of batch norm: PyTorch uses the unbiased variance, TensorFlow the biased one;
- the last mean is over the whole map for images of any size.
"""

from torch import nn

from robsparse.models._layers import (
    MODULES,
    BasicBlock,
    Bottleneck,
    conv3x3,
    mean_and_classify,
    network,
    require_size,
    stage,
)
from robsparse.schema import Residual

NAMES = ("resnet18", "resnet34", "resnet50")
SMALLEST = 8  # pixels a side of the images


class Params(Residual):
    """The padding, the activation and the normalisation of the images."""


# The kind of block, and the number of blocks in each of the four stages.
STAGES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build conv1, stage1..stage4 (widths 64, 128, 256, 512), mean, classifier.

    x_NCHW in [0,1] -> logits_NK. Stages 2 to 4 halve the map and round up.

    Raises:
        UsageError: if a side of the images is below 8 pixels, or as `network` does.
    """
    require_size(name, image_shape, SMALLEST)
    block, depths = STAGES[name]
    channels = 64
    layers: dict[str, nn.Module] = {
        "conv1": conv3x3(image_shape[0], channels),
        "bn1": nn.BatchNorm2d(channels),
        "relu": MODULES[params.activation](),
    }
    for number, depth in enumerate(depths, start=1):
        width, stride = 32 * 2**number, 1 if number == 1 else 2
        layers[f"stage{number}"] = stage(
            block, channels, width, depth=depth, stride=stride, params=params
        )
        channels = block.expansion * width
    return network(name, params, image_shape[0], layers | mean_and_classify(channels, classes))
