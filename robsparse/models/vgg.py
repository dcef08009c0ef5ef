"""VGG16 for 32x32 images.

Source: the BCS authors' repository (IGITUGraz/SparseAdversarialTraining), behaviour of
models/sparse_vgg16.py.

Differs from the authors' code:
- the running variance of batch norm: PyTorch uses the unbiased variance, TensorFlow the biased one;
- images may have another size than 32x32.
"""

from torch import nn

from robsparse.models._layers import conv3x3, network, require_size
from robsparse.schema import Normalised

NAMES = ("vgg16",)
SMALLEST = 16  # pixels a side of the images

# Channels of the 3x3 convolutions. A 2x2 max-pool follows each block except the last.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Params(Normalised):
    """Only the normalisation of the images."""


def build(name: str, params: Params, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build the network: x_NCHW in [0,1] -> logits_NK.

    Its layers are conv1..conv13 (3x3, no bias, BN, ReLU), fc14, fc15 and fc16. For images of 32x32
    pixels the last map has 2x2 pixels. Maps of other sizes are averaged to 2x2; a side of one pixel
    (from images below 32 pixels) is repeated.

    Raises:
        UsageError: if a side of the images is below 16 pixels, or as `network` does.
    """
    require_size(name, image_shape, SMALLEST)
    channels, height, width = image_shape
    layers: dict[str, nn.Module] = {}
    number = 0
    for block, widths in enumerate(BLOCKS, start=1):
        for out in widths:
            number += 1
            layers[f"conv{number}"] = conv3x3(channels, out)
            layers[f"bn{number}"] = nn.BatchNorm2d(out)
            layers[f"relu{number}"] = nn.ReLU()
            channels = out
        if block < len(BLOCKS):
            layers[f"pool{block}"] = nn.MaxPool2d(2)
    if (height // 16, width // 16) != (2, 2):  # pooling to the same size is slow
        layers["mean"] = nn.AdaptiveAvgPool2d(2)
    layers |= {
        "flatten": nn.Flatten(),
        "fc14": nn.Linear(4 * channels, 256),
        "relu14": nn.ReLU(),
        "fc15": nn.Linear(256, 256),
        "relu15": nn.ReLU(),
        "fc16": nn.Linear(256, classes),
    }
    return network(name, params, image_shape[0], layers)
