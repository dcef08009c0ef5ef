"""ResNet-18, 34 and 50 for 32x32 images: a 3x3 first convolution of stride 1, no max-pool.

Source: the BCS authors' repository (IGITUGraz/SparseAdversarialTraining), behaviour of
models/sparse_resnet.py.

Differs from the authors' code:
- the padding of convolutions of stride 2 (`padding: tensorflow` is theirs);
- the running variance of batch norm: PyTorch uses the unbiased variance, TensorFlow the biased one;
- the last mean is over the whole map for images of any size.
"""

from torch import Tensor, nn

from robsparse.models._layers import (
    FUNCTIONS,
    MODULES,
    BasicBlock,
    conv1x1,
    conv3x3,
    mean_and_classify,
    network,
    require_size,
    shortcut,
)
from robsparse.schema import Activation, Residual

NAMES = ("resnet18", "resnet34", "resnet50")
SMALLEST = 8  # pixels a side of the images


class Params(Residual):
    """The padding, the activation and the normalisation of the images."""


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with BN, added to the input.

    x_NCHW -> (N, 4*width, H/stride, W/stride). The 3x3 convolution has the stride.
    Source: He et al. (CVPR 2016), figure 5, right.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        padding: str = "symmetric",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.activation = FUNCTIONS[activation]
        outputs = self.expansion * width
        self.conv1 = conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, padding)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x_NCHW)))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.activation(out + self.shortcut(x_NCHW))


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
        stage = nn.Sequential()
        for step in range(depth):
            first = stride if step == 0 else 1
            stage.append(block(channels, width, first, params.padding, params.activation))
            channels = block.expansion * width
        layers[f"stage{number}"] = stage
    return network(name, params, image_shape[0], layers | mean_and_classify(channels, classes))
