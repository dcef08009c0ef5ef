"""Convolutions of small maps as the matrices that they are, dense or sparse: for CPUs.

Libraries are slow at small maps, whose gradient above all, and have no sparse convolution. As a
matrix a convolution is one product each way, and a sparse one costs by its live weights. Maps are
rows or columns of features in the order (pixel, channel), one an image: a sparse product is fast
with columns alone, convolutions that stay convolutions come from and go to rows at no cost.
"""

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from robsparse.models._layers import TensorFlowConv2d

# Of all that is beta about them nothing but a product with a dense matrix is used here.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

# Pixels of the largest map that is small.
PIXELS = 64
# Entries of the largest dense matrix: in fp32 it fits a core's cache.
LARGEST_DENSE = 300_000
# Live share of a layer up to which a sparse matrix, made anew for ten passes, is faster than the
# convolution: of narrow layers (and their largest number of weights), of others in fp32 and bf16.
NARROW, NARROW_WEIGHTS, WIDE, WIDE_BF16 = 0.3, 100_000, 0.05, 0.01


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
        # Of each out pixel and tap the pixel, or -1; and the pairs that have one.
        self.pixel_of, self.pixels = met, pixels
        self.where = (met >= 0).nonzero(as_tuple=True)
        self.pattern = _Pattern(met.numpy(), pixels)
        self.size = _out_size(layer, height, width)

    def form(self, kind: str, weight: Tensor, bias: Tensor | None) -> None:
        """Take over weights (outputs, inputs, height, width) and bias, of the layer as folded."""
        taps = weight.flatten(2)  # outputs x inputs x taps
        if kind == "dense":
            out, tap = self.where
            shape = (len(self.pixel_of), len(taps), self.pixels, taps.shape[1])
            matrix = weight.new_zeros(shape)
            matrix[out, :, self.pixel_of[self.where]] = taps.permute(2, 0, 1)[tap]
            self.matrix = matrix.view(shape[0] * shape[1], -1)
            self.back = self.matrix.t()
        else:
            self.matrix, self.back = self.pattern.matrices(taps)
        self.bias = None if bias is None else bias.repeat(len(self.pixel_of))

    def __call__(self, x: Tensor, *, rectified: bool, columns: bool = True) -> Tensor:
        """x_NCHW -> the next map; with `columns` its images lie innermost in memory."""
        if not columns:
            out = x.permute(0, 2, 3, 1).reshape(len(x), -1) @ self.back
            out = self._finished(out, self.bias, rectified)
            return out.view(len(x), *self.size, -1).permute(0, 3, 1, 2)
        out = _Product.apply(x.permute(2, 3, 1, 0).reshape(-1, len(x)), self.matrix, self.back)
        out = self._finished(out, None if self.bias is None else self.bias[:, None], rectified)
        return out.view(*self.size, -1, len(x)).permute(3, 2, 0, 1)

    def _finished(self, out: Tensor, bias: Tensor | None, rectified: bool) -> Tensor:
        if bias is not None:
            out += bias
        return out.relu_() if rectified else out


class _Product(torch.autograd.Function):
    """matrix @ columns; torch would transpose a sparse matrix anew for every gradient."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, matrix: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return matrix @ columns

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back @ upstream, None, None


class _Pattern:
    """Where the live weights of a convolution stand in its matrix: found again when they change.

    In NumPy and SciPy, several times faster at it than torch: the live weights of a network that
    rewires change at every step.
    """

    def __init__(self, pixel_of: np.ndarray, pixels: int) -> None:
        """pixel_of: of each out pixel and tap the pixel, or -1; pixels: the number of pixels."""
        self.pixel_of, self.pixels = pixel_of.astype(np.int32), pixels
        self.live: np.ndarray | None = None

    def matrices(self, taps: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix of weights `taps` (outputs x inputs x taps) and its transpose, both CSR."""
        weights = np.ascontiguousarray(taps.numpy())
        live = np.flatnonzero(weights)
        if self.live is None or not np.array_equal(live, self.live):
            self.live = live
            self.forth = self._find(live, weights.shape)
            self.back = self.forth.tocsc()
        values, shape = weights.ravel()[live], self.forth.shape
        return _csr(self.forth, values, shape), _csr(self.back, values, shape[::-1])

    def _find(self, live: np.ndarray, shape: tuple[int, ...]) -> sparse.csr_array:
        """The matrix with the number of its weight, among the live ones, at each entry."""
        output, channel, tap = (part.astype(np.int32) for part in np.unravel_index(live, shape))
        met = self.pixel_of[:, tap]  # out pixels x live weights, which are in order of outputs
        there = met >= 0
        where = np.flatnonzero(there)
        columns = (met * np.int32(shape[1]) + channel).ravel()[where]
        number = np.broadcast_to(np.arange(len(live), dtype=np.int32), met.shape).ravel()[where]
        # A row is (out pixel, output): before it stand the entries of the weights before its first.
        before = np.zeros((len(met), len(live) + 1), dtype=np.int32)
        np.cumsum(there, axis=1, out=before[:, 1:])
        starts = before[:, np.searchsorted(output, np.arange(shape[0]))]
        starts += np.cumsum(before[:, -1:], axis=0, dtype=np.int32) - before[:, -1:]
        starts = np.append(starts.ravel(), np.int32(len(where)))
        size = (len(met) * shape[0], self.pixels * shape[1])
        return sparse.csr_array((number, columns, starts), shape=size)


def _csr(pattern: sparse.csr_array, values: np.ndarray, shape: tuple[int, int]) -> Tensor:
    parts = (pattern.indptr, pattern.indices, values[pattern.data])
    return torch.sparse_csr_tensor(*map(torch.from_numpy, parts), shape, check_invariants=False)


def _out_size(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Height and width of the next map."""
    image = torch.empty(1, layer.in_channels, height, width, device="meta")
    weight = torch.empty(layer.weight.shape, device="meta")
    if isinstance(layer, TensorFlowConv2d):
        image = layer.padded(image)
    out = F.conv2d(image, weight, None, layer.stride, layer.padding, layer.dilation)
    return out.shape[2], out.shape[3]
