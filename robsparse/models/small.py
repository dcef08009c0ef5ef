"""Small convolutional networks with batch norm, for studies that run on a laptop."""

from pydantic import Field, PositiveInt
from torch import nn

from robsparse.models._layers import (
    MODULES,
    BasicBlock,
    conv3x3,
    mean_and_classify,
    network,
    require_size,
)
from robsparse.schema import Activated

NAMES = ("small_cnn", "small_resnet")
SMALLEST = {"small_cnn": 5, "small_resnet": 4}  # pixels a side of the images


class Params(Activated):
    """width: number of channels of the first convolution, in 1..1024.

    Later convolutions have 2 and 4 times as many channels.
    """

    width: PositiveInt = Field(16, le=1024)


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build one of the two networks: x_NCHW in [0,1] -> logits_NK.

    small_cnn: three 3x3 convolutions (strides 1, 2, 2) with BN and the activation, 2x2 mean pool,
    one linear layer. small_resnet: a 3x3 convolution, three basic residual blocks (strides 1, 2,
    2), mean over the whole map, one linear layer.

    Initial weights are drawn from a truncated normal of variance 2 / fan_in; biases are 0.

    Raises:
        UsageError: if a side of the images is below 5 (small_cnn) or 4 pixels (small_resnet), or
            as `network` does.
    """
    layers = _cnn if name == "small_cnn" else _resnet
    require_size(name, image_shape, SMALLEST[name])
    return network(name, params, image_shape[0], layers(params, image_shape, classes))


def _cnn(params: Params, image_shape: tuple[int, int, int], classes: int) -> dict[str, nn.Module]:
    channels, height, breadth = image_shape
    width = params.width
    layers: list[nn.Module] = []
    for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        layers += [conv3x3(channels, out, stride), nn.BatchNorm2d(out)]
        layers.append(MODULES[params.activation]())
        channels = out
    # A map of 2x2 pixels needs no pooling, and torch's pooling to the same size is slow.
    if (-(-height // 4), -(-breadth // 4)) != (2, 2):
        layers.append(nn.AdaptiveAvgPool2d(2))
    layers += [nn.Flatten(), nn.Linear(4 * channels, classes)]
    return {str(number): layer for number, layer in enumerate(layers)}


def _resnet(
    params: Params, image_shape: tuple[int, int, int], classes: int
) -> dict[str, nn.Module]:
    width, kind = params.width, params.activation
    return {
        "conv1": conv3x3(image_shape[0], width),
        "bn1": nn.BatchNorm2d(width),
        "relu": MODULES[kind](),
        "stage1": BasicBlock(width, width, 1, activation=kind),
        "stage2": BasicBlock(width, 2 * width, 2, activation=kind),
        "stage3": BasicBlock(2 * width, 4 * width, 2, activation=kind),
        **mean_and_classify(4 * width, classes),
    }
