"""The layers of a frozen view: weights formed once, batch norm folded in, laid out for the device.

A CPU is slow at convolutions of tiny maps, whose gradient above all: there a convolution is written
as the one matrix that it is. Where that pays, and which layout convolutions want, was measured
(docs/speed.md); it follows from shapes alone, so that the same run gives the same bits again.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.models._layers import TensorFlowConv2d

# Entries of the largest matrix that stands for a convolution: in fp32 it fits a core's cache.
LARGEST_MATRIX = 300_000
# Pixels of a map up to which a CPU is faster at it with channels first, if no gradient is asked.
SMALL_MAP = 64
# Weights of a convolution from which a CPU is faster at fp32 with channels first.
MANY_WEIGHTS = 2**20


class Weighted(nn.Module):
    """A convolution or linear layer, with the batch norm and the ReLU after it if there are any."""

    def __init__(self, layer: nn.Module, norm: nn.BatchNorm2d | None, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.plain: Tensor | None = None  # the weights, channels first, once they are asked for
        self.__dict__["layer"], self.__dict__["norm"] = layer, norm
        self.__dict__["apply"] = _how(layer)
        # By size of the map: the table of taps and the size of the next map; the matrix, the bias.
        self.tables: dict[torch.Size, tuple[Tensor, torch.Size]] = {}
        self.matrices: dict[torch.Size, list[Tensor | None]] = {}

    def refresh(self, dtype: torch.dtype | None) -> None:
        """weight * g and (bias - mean) * g + beta, with g = gamma / sqrt(variance + eps).

        dtype: what convolutions with fp32 weights compute in, None for fp32. Linear layers are
        small and the logits need their digits: they stay as they are.
        """
        weight, bias = self.layer.weight.detach(), self.layer.bias
        bias = None if bias is None else bias.detach()
        if self.norm is not None:
            scale, shift = scale_and_shift(self.norm)
            weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else bias * scale + shift
        if weight.ndim == 4 and dtype is not None and weight.dtype == torch.float32:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if weight.ndim == 4:
            weight = weight.contiguous(memory_format=_layout(weight))
        self.plain = None
        self.weight, self.bias = renewed(self.weight, weight), renewed(self.bias, bias)
        for size in self.matrices:
            self._form_matrix(size)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = x.to(self.weight.dtype), self.weight
        if weight.ndim == 4:
            if x.requires_grad and not x.is_cuda and self._is_tiny(x):
                return self._multiplied(x)
            weight, layout = self._laid_out(x)
            x = x.contiguous(memory_format=layout)
        out = self.apply(x, weight, self.bias)
        return out.relu_() if self.rectified else out

    def _laid_out(self, x: Tensor) -> tuple[Tensor, torch.memory_format]:
        """The weights of a convolution, and the layout that they and x have."""
        forward_only = not x.requires_grad and not x.is_cuda and x.dtype == torch.float32
        if not forward_only or x.shape[2] * x.shape[3] > SMALL_MAP:
            return self.weight, _layout(self.weight)
        if self.plain is None:
            self.plain = self.weight.contiguous()
        return self.plain, torch.contiguous_format

    # ---------------------------------------------------------------- tiny maps on a CPU

    def _is_tiny(self, x: Tensor) -> bool:
        """Whether one matrix of moderate size takes a map of this size to the next one."""
        layer = self.layer
        if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
        pixels, stride = x.shape[2] * x.shape[3], layer.stride[0] * layer.stride[1]
        entries = x.shape[1] * pixels * len(self.weight) * -(-pixels // stride)
        return entries <= LARGEST_MATRIX

    def _multiplied(self, x: Tensor) -> Tensor:
        """The convolution as a product with a matrix; maps are rows of (pixel, channel)."""
        size = x.shape[2:]
        if size not in self.tables:
            self.tables[size] = self._table(x), self.apply(x[:1], self.weight, None).shape[2:]
            self.matrices[size] = [None, None]
            self._form_matrix(size)
        matrix, bias = self.matrices[size]
        height, width = self.tables[size][1]
        rows = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        out = rows @ matrix
        if bias is not None:
            out += bias  # torch.addmm would first copy it to every row, at four times the cost
        if self.rectified:
            out.relu_()
        return out.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    def _form_matrix(self, size: torch.Size) -> None:
        """(inputs, outputs) from the weights of now, and the bias of every output."""
        table = self.tables[size][0]
        taps = self.weight.permute(1, 2, 3, 0).reshape(-1, len(self.weight))
        taps = torch.cat([taps, taps.new_zeros(1, taps.shape[1])])
        matrix = taps[table].view(len(table), -1)
        bias = None if self.bias is None else self.bias.repeat(table.shape[1])
        self.matrices[size] = list(map(renewed, self.matrices[size], (matrix, bias)))

    def _table(self, x: Tensor) -> Tensor:
        """Which tap (of C * height * width; their number: none) joins an input to an out pixel.

        Shape (inputs in the order of (pixel, channel), out pixels).
        """
        channels, (height, width) = x.shape[1], x.shape[2:]
        inputs = x[0].numel()
        # Number the inputs from 1 on, and see which of them each tap of each out pixel meets.
        number = torch.arange(1, inputs + 1, dtype=torch.float64)
        image = number.view(1, height, width, channels).permute(0, 3, 1, 2)
        met = self._windows(image)[0].long()  # (taps, out pixels)
        table = torch.full((inputs + 1, met.shape[1]), len(met))
        table[met, torch.arange(met.shape[1])] = torch.arange(len(met))[:, None]
        return table[1:]  # row 0 are the zeros around the image

    def _windows(self, image: Tensor) -> Tensor:
        layer, padding = self.layer, self.layer.padding
        if isinstance(layer, TensorFlowConv2d):
            image, padding = layer.padded(image), 0
        return F.unfold(image, layer.kernel_size, layer.dilation, padding, layer.stride)


class Norm(nn.Module):
    """Batch norm that no layer takes up."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.__dict__["norm"] = norm
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None

    def refresh(self, dtype: torch.dtype | None) -> None:
        """Form scale and shift, as `Weighted.refresh` does."""
        scale, shift = (value.view(-1, 1, 1) for value in scale_and_shift(self.norm))
        if dtype is not None and scale.dtype == torch.float32:
            scale, shift = scale.to(dtype), shift.to(dtype)
        self.scale, self.shift = renewed(self.scale, scale), renewed(self.shift, shift)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as x * scale + shift, one of each a channel."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def renewed(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """A copy of `new`, in the memory of `old` if that is alike: a CUDA graph goes on reading it."""
    if new is None:
        return None
    kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in (old, new) if t is not None]
    return old.copy_(new) if len(kinds) == 2 and kinds[0] == kinds[1] else new.clone()


def require_plain(module: nn.Module) -> None:
    """Raise ValueError for a layer that does something else than its kind."""
    known = (nn.Conv2d.forward, nn.Linear.forward, TensorFlowConv2d.forward)
    if type(module).forward not in known:
        raise ValueError(f"{type(module).__name__} has a forward of its own")


def _layout(weight: Tensor) -> torch.memory_format:
    """What a convolution with these weights wants."""
    wide = weight.numel() > MANY_WEIGHTS and not weight.is_cuda and weight.dtype != torch.bfloat16
    return torch.contiguous_format if wide else torch.channels_last


def _how(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The layer as a function of x, weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, TensorFlowConv2d):
        return lambda x, weight, bias: layer._conv_forward(layer.padded(x), weight, bias)
    return layer._conv_forward
