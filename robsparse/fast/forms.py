"""Forms of a convolution with fixed weights on a CPU: four ways to compute the same function.

A form computes the output, with the addition of another map and the ReLU after it, and the gradient
of the input, with the addition of another gradient and the gate of the ReLU before it. It is made
for maps of one size. `costs` measures which form is the fastest.

channels_last, channels_first: the convolution of torch in this memory format.
matrix: one product with a dense matrix, for small maps. Libraries are slow for small maps.
sparse: the kernels of `robsparse.kernels`, which multiply active weights only.

The results of matrix and sparse have images innermost in memory.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from robsparse.kernels.geometry import Geometry, Pair
from robsparse.kernels.maps import images_innermost
from robsparse.kernels.patterns import Pattern, SparseConvolution
from robsparse.models._layers import TensorFlowConv2d
from robsparse.sparsity.compact_weight import CompactWeight

Kind = Literal["channels_last", "channels_first", "matrix", "sparse"]

FORMATS = {
    "channels_last": torch.channels_last,
    "channels_first": torch.contiguous_format,
}
# The largest number of entries of a matrix. In fp32, it fits into the cache of a core.
LARGEST_MATRIX = 300_000


class Form(Protocol):
    """A convolution with fixed weights. torch records no gradient."""

    def output(self, x_NCHW: Tensor, other: Tensor | None, *, rectified: bool) -> Tensor:
        """Return the convolution of x, plus another map, followed by a ReLU if `rectified`."""

    def input_gradient(self, upstream: Tensor, other: Tensor | None, gate: Tensor | None) -> Tensor:
        """Return the gradient of the input, plus another one; 0 where the gate is not above 0."""


class PlainForm:
    """The convolution of torch in one memory format, in the precision of the weight."""

    def __init__(
        self, layer: nn.Conv2d, geometry: Geometry, weight: Tensor, bias: Tensor | None, kind: Kind
    ) -> None:
        self.layer, self.geometry, self.bias, self.format = layer, geometry, bias, FORMATS[kind]
        self.weight = weight.contiguous(memory_format=self.format)

    def output(self, x_NCHW: Tensor, other: Tensor | None, *, rectified: bool) -> Tensor:
        x_NCHW = x_NCHW.to(self.weight.dtype).contiguous(memory_format=self.format)
        return finish(apply(self.layer, x_NCHW, self.weight, self.bias), other, rectified)

    def input_gradient(self, upstream: Tensor, other: Tensor | None, gate: Tensor | None) -> Tensor:
        layer = self.layer
        height, width = self.geometry.size
        top = left = bottom = right = 0
        if isinstance(layer, TensorFlowConv2d):
            (top, left), bottom, right = self.geometry.padding, 1, 1
        size = (top + height + bottom, left + width + right)
        upstream = upstream.to(self.weight.dtype).contiguous(memory_format=self.format)
        like = upstream.new_empty((len(upstream), layer.in_channels, *size))  # only its shape
        gradient = torch.ops.aten.convolution_backward(
            upstream, like.contiguous(memory_format=self.format), self.weight, None,
            layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups,
            [True, False, False],
        )[0]  # fmt: skip
        return gated(gradient[:, :, top : top + height, left : left + width], other, gate)


class MatrixForm:
    """A dense matrix: (out pixels * outputs) x (pixels * inputs), times one column per image."""

    def __init__(self, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> None:
        self.geometry = geometry
        outputs, inputs = weight.shape[:2]
        read = pixels_of_taps(geometry)  # out pixels x taps
        pixels = geometry.size[0] * geometry.size[1]
        matrix = weight.new_zeros((len(read), outputs, pixels, inputs))
        out, tap = (read >= 0).nonzero(as_tuple=True)
        matrix[out, :, read[out, tap]] = weight.flatten(2).permute(2, 0, 1)[tap]
        self.matrix = matrix.view(len(read) * outputs, -1)
        self.bias = None if bias is None else bias.repeat(len(read))[:, None]

    def output(self, x_NCHW: Tensor, other: Tensor | None, *, rectified: bool) -> Tensor:
        out = self.matrix @ self._columns(x_NCHW)
        if self.bias is not None:
            out += self.bias
        map_NCHW = out.view(*self.geometry.out, -1, len(x_NCHW)).permute(3, 2, 0, 1)
        return finish(map_NCHW, other, rectified)

    def input_gradient(self, upstream: Tensor, other: Tensor | None, gate: Tensor | None) -> Tensor:
        out = self.matrix.t() @ self._columns(upstream)
        gradient = out.view(*self.geometry.size, -1, len(upstream)).permute(3, 2, 0, 1)
        return gated(gradient, other, gate)

    def _columns(self, map_NCHW: Tensor) -> Tensor:
        innermost = images_innermost(map_NCHW.to(self.matrix.dtype))
        return innermost.permute(2, 3, 1, 0).reshape(-1, len(map_NCHW))


class SparseForm:
    """The sparse kernels, in fp32 or fp64."""

    def __init__(self, pattern: Pattern, weight: Tensor, bias: Tensor | None) -> None:
        if isinstance(weight, CompactWeight):
            values = weight.active_values[weight.active_values != 0]
        else:
            values = weight.contiguous().view(-1)[pattern.positions]
        self.convolution, self.bias = SparseConvolution(pattern, values), bias

    def output(self, x_NCHW: Tensor, other: Tensor | None, *, rectified: bool) -> Tensor:
        laid_out = self._laid_out(x_NCHW)
        assert laid_out is not None
        other = self._laid_out(other)
        return self.convolution.output(laid_out, self.bias, other, rectified=rectified)

    def input_gradient(self, upstream: Tensor, other: Tensor | None, gate: Tensor | None) -> Tensor:
        laid_out = [self._laid_out(tensor) for tensor in (upstream, other, gate)]
        assert laid_out[0] is not None
        return self.convolution.input_gradient(laid_out[0], *laid_out[1:])

    def _laid_out(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return images_innermost(tensor.to(self.convolution.values.dtype))


def apply(layer: nn.Conv2d, x_NCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the result of a convolution with another weight and bias."""
    if isinstance(layer, TensorFlowConv2d):
        x_NCHW = layer.padded(x_NCHW)
    return layer._conv_forward(x_NCHW, weight, bias)


def finish(out: Tensor, other: Tensor | None, rectified: bool) -> Tensor:
    """Add another map to a new tensor, and apply the ReLU if asked for. In place if possible."""
    if other is not None:
        out = out.add_(other) if other.dtype == out.dtype else out + other
    return out.relu_() if rectified else out


def gated(gradient: Tensor, other: Tensor | None, gate: Tensor | None) -> Tensor:
    """Add another gradient to a gradient, and set it to 0 where the gate is not above 0."""
    if other is not None:
        gradient = gradient + other
    if gate is None:
        return gradient
    return torch.ops.aten.threshold_backward(gradient, gate.to(gradient.dtype), 0)


def geometry_of(layer: nn.Conv2d, size: Pair) -> Geometry | None:
    """Return the geometry of a layer for maps of this height and width, or None for other kinds.

    Other kinds are padding with other values than 0 and padding given as a text.
    """
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    padding = after = _pair(layer.padding)
    if isinstance(layer, TensorFlowConv2d):
        padding, after = (size[0] % 2, size[1] % 2), (1, 1)
    outputs, inputs, *kernel = layer.weight.shape
    stride, dilation = _pair(layer.stride), _pair(layer.dilation)
    out = [
        (size[axis] + padding[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis in (0, 1)
    ]
    return Geometry((outputs, inputs, *_pair(kernel)), size, _pair(out), stride, padding, dilation)


def pixels_of_taps(geometry: Geometry) -> Tensor:
    """Return the input pixel of each out pixel and tap, or -1 outside the map (int64)."""
    (ys, xs) = (_read(geometry, axis) for axis in (0, 1))
    height, width = geometry.size
    inside = (ys >= 0) & (ys < height), (xs >= 0) & (xs < width)
    both = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    pixel = ys[:, None, :, None] * width + xs[None, :, None, :]
    return torch.where(both, pixel, -1).flatten(2).flatten(0, 1)


def _read(geometry: Geometry, axis: int) -> Tensor:
    """Return the coordinate that each out coordinate and kernel index reads."""
    out = torch.arange(geometry.out[axis])[:, None] * geometry.stride[axis]
    taps = torch.arange(geometry.weight[2 + axis])[None] * geometry.dilation[axis]
    return out + taps - geometry.padding[axis]


def _pair(value: "tuple[int, ...] | list[int]") -> Pair:
    first, second = value
    return int(first), int(second)
