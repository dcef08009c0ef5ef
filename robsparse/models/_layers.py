"""What the architectures share: normalisation, convolutions, a residual block, initial weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robsparse.base.errors import UsageError
from robsparse.schema.fields import Normalised


class Normalise(nn.Module):
    """(x - mean) / std of each channel: x_NCHW in [0,1] -> x_NCHW.

    mean and std are buffers of C values: saved with the weights, never trained. Weights that were
    trained behind a normalisation are therefore refused by a network without one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return (x_NCHW - self.mean[:, None, None]) / self.std[:, None, None]


class TensorFlowConv2d(nn.Conv2d):
    """3x3 convolution of stride 2, padded with zeros as TensorFlow's 'SAME' does.

    x_NCHW -> (N, outputs, H/2, W/2), rounded up. Even sides are padded at the bottom and right
    alone, odd ones at both ends, as by PyTorch's padding=1.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, stride=2, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(self.padded(x_NCHW))

    def padded(self, x_NCHW: Tensor) -> Tensor:
        """The images with the zeros that this convolution adds."""
        height, width = x_NCHW.shape[-2:]
        return functional.pad(x_NCHW, (width % 2, 1, height % 2, 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN, added to the input: x_NCHW -> (N, width, H/stride, W/stride).

    Source: He et al. (CVPR 2016), figure 5, left; where the shape changes, option B of section 3.3.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, padding: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride, padding)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x_NCHW))


def conv3x3(inputs: int, outputs: int, stride: int = 1, padding: str = "symmetric") -> nn.Conv2d:
    """3x3 convolution without bias that keeps the size (stride 1) or halves it, rounded up (2)."""
    if stride == 2 and padding == "tensorflow":
        return TensorFlowConv2d(inputs, outputs)
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias; with stride 2 it sees pixels 0, 2, 4, ... of each side."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """What a residual block adds to its branch: the input, projected where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


def mean_and_classify(features: int, classes: int) -> dict[str, nn.Module]:
    """The end of a residual network: mean over the whole map, then one linear layer."""
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(features, classes),
    }


def network(
    name: str, params: Normalised, channels: int, layers: dict[str, nn.Module]
) -> nn.Sequential:
    """The layers in a row, freshly initialised, behind `normalise` if the parameters ask for it.

    Raises UsageError unless there is a mean and a std for each channel of the images.
    """
    first: dict[str, nn.Module] = {}
    if params.mean is not None and params.std is not None:
        for key, values in (("mean", params.mean), ("std", params.std)):
            if len(values) != channels:
                raise UsageError(
                    f"{name}: {key}: expected one value for each channel of the images "
                    f"({channels}), found {len(values)}"
                )
        first["normalise"] = Normalise(params.mean, params.std)
    model = nn.Sequential()
    for key, layer in (first | layers).items():
        model.add_module(key, layer)
    return model.apply(he_truncated_normal)


def require_size(name: str, image_shape: tuple[int, int, int], side: int) -> None:
    """Raise UsageError for images with fewer than `side` pixels a side."""
    _, height, width = image_shape
    if min(height, width) < side:
        raise UsageError(
            f"{name}: expected images of at least {side}x{side} pixels, found {height}x{width}"
        )


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
