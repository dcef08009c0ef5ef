"""Parts of several architectures: normalisation, convolutions, residual blocks, initial weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from robsparse.base.errors import UsageError
from robsparse.schema import Activation, Normalised, Residual

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
}
MODULES: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class Normalise(nn.Module):
    """Compute (x - mean) / std for each channel: x_NCHW in [0,1] -> x_NCHW.

    mean and std are buffers of C values. They are saved with the weights and never trained. A
    network without this layer therefore refuses the weights of a network with it.
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
    """3x3 convolution of stride 2 with the zero padding of TensorFlow's 'SAME'.

    x_NCHW -> (N, outputs, H/2, W/2), rounded up. If a side is even, zeros are added only at the
    bottom or right. If it is odd, zeros are added at both ends, as with PyTorch's padding=1.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, stride=2, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(self.padded(x_NCHW))

    def padded(self, x_NCHW: Tensor) -> Tensor:
        """Return the images with the zeros that this convolution adds."""
        height, width = x_NCHW.shape[-2:]
        return functional.pad(x_NCHW, (width % 2, 1, height % 2, 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN, added to the input: x_NCHW -> (N, width, H/stride, W/stride).

    If the shape changes, the shortcut is a 1x1 convolution with BN.

    Source: He et al. (CVPR 2016), figure 5, left, with option B of section 3.3.
    """

    expansion = 1

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
        self.conv1 = conv3x3(inputs, width, stride, padding)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x_NCHW)))
        out = self.bn2(self.conv2(out))
        return self.activation(out + self.shortcut(x_NCHW))


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


class PreActivationBlock(nn.Module):
    """BN, activation and a 3x3 convolution, twice; the result is added to the shortcut.

    x_NCHW -> (N, outputs, H/stride, W/stride). The shortcut is the input. If the number of channels
    changes, it is a 1x1 convolution of the input after BN and activation.

    Source: He et al. (ECCV 2016), figure 1 (b).
    """

    expansion = 1

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        padding: str = "symmetric",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.activation = FUNCTIONS[activation]
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride, padding)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None if inputs == outputs else conv1x1(inputs, outputs, stride)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        active = self.activation(self.bn1(x_NCHW))
        out = self.activation(self.bn2(self.conv1(active)))
        out = self.conv2(out)
        return out + (x_NCHW if self.shortcut is None else self.shortcut(active))


def conv3x3(inputs: int, outputs: int, stride: int = 1, padding: str = "symmetric") -> nn.Conv2d:
    """Return a 3x3 convolution without bias.

    Stride 1 keeps the size; stride 2 halves it and rounds up. `padding` is "symmetric" or
    "tensorflow".
    """
    if stride == 2 and padding == "tensorflow":
        return TensorFlowConv2d(inputs, outputs)
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias; with stride 2 it reads every second pixel."""
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return the shortcut of a residual block: the identity, or a projection to a new shape."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


def stage(
    block: type[BasicBlock | Bottleneck | PreActivationBlock],
    inputs: int,
    width: int,
    *,
    depth: int,
    stride: int,
    params: Residual,
) -> nn.Sequential:
    """Return `depth` residual blocks; the first one takes `inputs` channels and has the stride."""
    blocks = nn.Sequential()
    for channels, its_stride in [(inputs, stride), *[(block.expansion * width, 1)] * (depth - 1)]:
        blocks.append(block(channels, width, its_stride, params.padding, params.activation))
    return blocks


def mean_and_classify(features: int, classes: int) -> dict[str, nn.Module]:
    """Return the last layers of a residual network: mean over the whole map, one linear layer."""
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(features, classes),
    }


def network(
    name: str, params: Normalised, channels: int, layers: dict[str, nn.Module]
) -> nn.Sequential:
    """Return a network of the layers in order, with new initial weights.

    Args:
        name: of the architecture, for messages.
        params: if they contain mean and std, the first layer is `normalise`.
        channels: number of channels of the images.
        layers: the layers by name.

    Raises:
        UsageError: if mean and std do not have one value for each channel.
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
    """Draw the weights of a layer as in He et al. (2015); set its biases to 0.

    The distribution is a normal one, truncated at two standard deviations.
    """
    if isinstance(module, nn.Conv2d | nn.Linear):
        fan_in = module.weight[0].numel()
        # The truncation multiplies the standard deviation by this number.
        std = (2 / fan_in) ** 0.5 / 0.87962566103423978
        with torch.no_grad():
            nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
            if module.bias is not None:
                module.bias.zero_()
