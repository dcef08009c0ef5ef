"""Convolutions of small maps as the matrices that they are, dense or sparse: for CPUs.

Libraries are slow at small maps, whose gradient above all, and have no sparse convolution. As a
matrix a convolution is one product each way, and a sparse one costs by its live weights. Maps are
columns of features in the order (pixel, channel), one column an image.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.models._layers import TensorFlowConv2d

# Of all that is beta about them nothing but a product with a dense matrix is used here.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

# Pixels of the largest map that is small.
PIXELS = 64
# Entries of the largest dense matrix: in fp32 it fits a core's cache.
LARGEST_DENSE = 300_000
# Live share of a layer from which on a sparse matrix is slower than the convolution: of narrow
# layers (and their largest number of weights), and of others in fp32 and in bf16.
NARROW, NARROW_WEIGHTS, WIDE, WIDE_BF16 = 0.3, 100_000, 0.15, 0.02


def form_of(layer: nn.Conv2d, x: Tensor, live: float, *, bf16: bool) -> str:
    """How to compute a convolution of x_NCHW on a CPU: "conv", "dense" or "sparse" matrix.

    live: share of its weights that are not 0. Which is faster was measured (docs/speed.md).
    """
    pixels = x.shape[2] * x.shape[3]
    if (
        pixels > PIXELS
        or layer.groups != 1
        or layer.padding_mode != "zeros"
        or isinstance(layer.padding, str)
    ):
        return "conv"
    weights = layer.weight.numel()
    wide = WIDE_BF16 if bf16 else WIDE
    if live <= (NARROW if weights <= NARROW_WEIGHTS else wide):
        return "sparse"
    stride = layer.stride[0] * layer.stride[1]
    entries = x.shape[1] * pixels * len(layer.weight) * -(-pixels // stride)
    worth_it = x.requires_grad or x[0].numel() <= PIXELS
    return "dense" if worth_it and entries <= LARGEST_DENSE else "conv"


class SmallMap:
    """One convolution of maps of one size; `form` makes its matrix from the weights of now."""

    def __init__(self, layer: nn.Conv2d, height: int, width: int) -> None:
        pixels = height * width
        # Number the pixels from 1 on, and see which of them each tap of each out pixel meets.
        image = torch.arange(1.0, pixels + 1, dtype=torch.float64).view(1, 1, height, width)
        padding: Any = layer.padding
        if isinstance(layer, TensorFlowConv2d):
            image, padding = layer.padded(image), 0
        options = {"dilation": layer.dilation, "padding": padding, "stride": layer.stride}
        met = F.unfold(image, layer.kernel_size, **options)[0].T.long() - 1  # out pixels x taps
        # Of each out pixel and tap the pixel, of each pixel and tap the out pixel; -1: none.
        self.pixel_of = met
        self.out_of = torch.full((pixels, met.shape[1]), -1)
        self.where = (met >= 0).nonzero(as_tuple=True)
        self.out_of[met[self.where], self.where[1]] = self.where[0]
        self.size = _out_size(layer, height, width)

    def form(self, kind: str, weight: Tensor, bias: Tensor | None) -> None:
        """Take over weights (outputs, inputs, height, width) and bias, of the layer as folded."""
        taps = weight.flatten(2)  # outputs x inputs x taps
        if kind == "dense":
            out, tap = self.where
            shape = (len(self.pixel_of), len(taps), len(self.out_of), taps.shape[1])
            matrix = weight.new_zeros(shape)
            matrix[out, :, self.pixel_of[self.where]] = taps.permute(2, 0, 1)[tap]
            self.matrix = matrix.view(shape[0] * shape[1], -1)
            self.back = self.matrix.t()
        else:
            self.matrix = _sparse(self.pixel_of, taps, len(self.out_of))
            self.back = _sparse(self.out_of, taps.transpose(0, 1), len(self.pixel_of))
        self.bias = None if bias is None else bias.repeat(len(self.pixel_of))[:, None]

    def __call__(self, x: Tensor, *, rectified: bool) -> Tensor:
        """x_NCHW -> the next map, whose images lie innermost in memory."""
        columns = x.permute(2, 3, 1, 0).reshape(-1, len(x))
        out = _Product.apply(columns, self.matrix, self.back)
        if self.bias is not None:
            out += self.bias
        if rectified:
            out.relu_()
        return out.view(*self.size, -1, len(x)).permute(3, 2, 0, 1)


class _Product(torch.autograd.Function):
    """matrix @ columns; torch would transpose a sparse matrix anew for every gradient."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, matrix: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return matrix @ columns

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back @ upstream, None, None


def _sparse(table: Tensor, taps: Tensor, others: int) -> Tensor:
    """CSR matrix with rows (pixel, own channel) and columns (other pixel, other channel).

    table: of each pixel and tap the other pixel, or -1; taps: own channel x other channel x tap;
    others: the number of other pixels.
    """
    own, other, tap = taps.nonzero(as_tuple=True)  # in the order of the own channel
    met = table[:, tap]  # pixels x live weights
    pixel, live = (met >= 0).nonzero(as_tuple=True)  # in the order of (pixel, own channel)
    columns = met[pixel, live] * taps.shape[1] + other[live]
    rows = pixel * len(taps) + own[live]
    shape = (len(table) * len(taps), others * taps.shape[1])
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=shape[0]), 0, out=starts[1:])
    values = taps[own, other, tap][live]
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _out_size(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Height and width of the next map."""
    image = torch.empty(1, layer.in_channels, height, width, device="meta")
    weight = torch.empty(layer.weight.shape, device="meta")
    if isinstance(layer, TensorFlowConv2d):
        image = layer.padded(image)
    out = F.conv2d(image, weight, None, layer.stride, layer.padding, layer.dilation)
    return out.shape[2], out.shape[3]
