"""Wide residual networks WRN-28-2, 28-4, 28-10 and 34-10: pre-activation blocks, no dropout.

Source: the BCS authors' repository (IGITUGraz/SparseAdversarialTraining), behaviour of
models/sparse_wideresnet.py; design of Zagoruyko and Komodakis (BMVC 2016), table 1.

Differs from the BCS authors' code:
- the padding of convolutions of stride 2 (`padding: tensorflow` is theirs);
- the running variance of batch norm: PyTorch uses the unbiased variance, TensorFlow the biased one;
- the last mean is over the whole map for images of any size.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from robsparse.models._layers import conv1x1, conv3x3, mean_and_classify, network, require_size
from robsparse.schema import Normalised

NAMES = ("wrn28_2", "wrn28_4", "wrn28_10", "wrn34_10")
SMALLEST = 4  # pixels a side of the images


class Params(Normalised):
    """padding: where a 3x3 convolution of stride 2 adds zeros.

    "symmetric": one row or column on every side. "tensorflow": as the BCS authors' TensorFlow; if
    a side is even, only at the bottom or right. Trained weights need the padding that they were
    trained with.
    """

    padding: Literal["symmetric", "tensorflow"] = "symmetric"


class PreActivationBlock(nn.Module):
    """BN, ReLU and a 3x3 convolution, twice; the result is added to the shortcut.

    x_NCHW -> (N, outputs, H/stride, W/stride). The shortcut is the input. If the number of channels
    changes, it is a 1x1 convolution of the input after BN and ReLU.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, padding: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride, padding)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None if inputs == outputs else conv1x1(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        active = functional.relu(self.bn1(x_NCHW))
        out = functional.relu(self.bn2(self.conv1(active)))
        out = self.conv2(out)
        return out + (x_NCHW if self.shortcut is None else self.shortcut(active))


# Depth (number of all convolutions, with the three of the shortcuts) and widening factor k.
SIZES = {"wrn28_2": (28, 2), "wrn28_4": (28, 4), "wrn28_10": (28, 10), "wrn34_10": (34, 10)}


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build conv1, block1..block3 of 16k, 32k, 64k channels, BN, ReLU, mean, classifier.

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
        block = nn.Sequential()
        for step in range((depth - 4) // 6):
            block.append(
                PreActivationBlock(channels, width, stride if step == 0 else 1, params.padding)
            )
            channels = width
        layers[f"block{number}"] = block
    layers |= {"bn1": nn.BatchNorm2d(channels), "relu": nn.ReLU()}
    return network(name, params, image_shape[0], layers | mean_and_classify(channels, classes))
