"""Convolutions of small maps as dense or sparse matrices, for CPUs.

Libraries are slow for small maps, especially for the gradient, and have no sparse convolution. With
a matrix, a convolution is one product forward and one product backward. The cost of a sparse
product is proportional to the number of nonzero weights. The map of an image is a row or a column
of features in the order (pixel, channel). A sparse product is only fast with columns. Other
convolutions read and write rows without a copy.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from robsparse.models._layers import TensorFlowConv2d

# This module only uses the product of a sparse and a dense matrix.
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

# The largest number of pixels of a small map.
PIXELS = 64
# The largest number of entries of a dense matrix. In fp32, it fits into the cache of a core.
LARGEST_DENSE = 300_000
# The largest density for which a sparse matrix is faster than the convolution, if it is built for
# ten passes: for narrow layers (and their largest number of weights), and for others in fp32, bf16.
NARROW, NARROW_WEIGHTS, WIDE, WIDE_BF16 = 0.3, 100_000, 0.05, 0.01


def choose_form(layer: nn.Conv2d, x: Tensor, density: float, *, bf16: bool) -> str:
    """Return how a CPU computes a convolution of x_NCHW: "conv", or a "dense" or "sparse" matrix.

    density: share of nonzero weights. The limits were measured (docs/speed.md).
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
    if density <= (NARROW if weights <= NARROW_WEIGHTS else wide):
        return "sparse"
    stride = layer.stride[0] * layer.stride[1]
    entries = x.shape[1] * pixels * len(layer.weight) * -(-pixels // stride)
    worth_it = x.requires_grad or x[0].numel() <= PIXELS
    return "dense" if worth_it and entries <= LARGEST_DENSE else "conv"


class SmallMap:
    """A convolution of maps of one size: the pixels of each kernel tap, without the weights."""

    def __init__(self, layer: nn.Conv2d, height: int, width: int) -> None:
        pixels = height * width
        # Number the pixels from 1, and find the pixel of each tap of each out pixel.
        image = torch.arange(1.0, pixels + 1, dtype=torch.float64).view(1, 1, height, width)
        padding: Any = layer.padding
        if isinstance(layer, TensorFlowConv2d):
            image, padding = layer.padded(image), 0
        options = {"dilation": layer.dilation, "padding": padding, "stride": layer.stride}
        met = F.unfold(image, layer.kernel_size, **options)[0].T.long() - 1  # out pixels x taps
        # For each out pixel and tap: the pixel, or -1. And the pairs that have a pixel.
        self.pixel_of, self.pixels = met, pixels
        self.where = (met >= 0).nonzero(as_tuple=True)
        self.pattern = _Pattern(met.numpy(), pixels)
        self.size = _out_size(layer, height, width)

    def form(self, kind: str, weight: Tensor, bias: Tensor | None) -> "Matrix":
        """Return the "dense" or "sparse" matrix of the convolution with these folded parameters.

        weight: (outputs, inputs, height, width). bias: (outputs), or None.
        """
        taps = weight.flatten(2)  # outputs x inputs x taps
        if kind == "dense":
            matrix = self._dense(taps)
            transpose = matrix.t()
        else:
            matrix, transpose = self.pattern.matrices(taps)
        repeated = None if bias is None else bias.repeat(len(self.pixel_of))
        return Matrix(matrix, transpose, repeated, self.size)

    def _dense(self, taps: Tensor) -> Tensor:
        """Return the dense matrix: (out pixels * outputs) x (pixels * inputs)."""
        out, tap = self.where
        shape = (len(self.pixel_of), len(taps), self.pixels, taps.shape[1])
        matrix = taps.new_zeros(shape)
        matrix[out, :, self.pixel_of[self.where]] = taps.permute(2, 0, 1)[tap]
        return matrix.view(shape[0] * shape[1], -1)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A convolution of small maps as a matrix, with its transpose: x_NCHW -> the next map.

    bias: one value for each row of the matrix, or None. size: height and width of the next map.
    """

    matrix: Tensor
    transpose: Tensor
    bias: Tensor | None
    size: tuple[int, int]

    def __call__(self, x: Tensor, *, rectified: bool, columns: bool = True) -> Tensor:
        """Return the next map. x may have another precision.

        rectified: apply a ReLU. columns: images are innermost in memory.
        """
        x = x.to(self.matrix.dtype)
        if not columns:
            out = x.permute(0, 2, 3, 1).reshape(len(x), -1) @ self.transpose
            out = self._finished(out, self.bias, rectified)
            return out.view(len(x), *self.size, -1).permute(0, 3, 1, 2)
        out = _Product.apply(x.permute(2, 3, 1, 0).reshape(-1, len(x)), self.matrix, self.transpose)
        out = self._finished(out, None if self.bias is None else self.bias[:, None], rectified)
        return out.view(*self.size, -1, len(x)).permute(3, 2, 0, 1)

    def _finished(self, out: Tensor, bias: Tensor | None, rectified: bool) -> Tensor:
        if bias is not None:
            out += bias
        return out.relu_() if rectified else out


class _Product(torch.autograd.Function):
    """matrix @ columns. torch would transpose a sparse matrix again for every gradient."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        ctx.transpose = transpose
        return matrix @ columns

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose @ upstream, None, None


class _Pattern:
    """The positions of the nonzero weights of a convolution in its matrix.

    In a network that rewires, the nonzero weights change at every step. NumPy and SciPy find their
    positions several times faster than torch. The positions of the last call are stored. They are
    used again if the same weights are nonzero.
    """

    def __init__(self, pixel_of: np.ndarray, pixels: int) -> None:
        """pixel_of: the pixel of each out pixel and tap, or -1. pixels: the number of pixels."""
        self.pixel_of, self.pixels = pixel_of.astype(np.int32), pixels
        self.nonzero: np.ndarray | None = None

    def matrices(self, taps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrix of weights (outputs x inputs x taps) and its transpose, both CSR."""
        weights = np.ascontiguousarray(taps.numpy())
        nonzero = np.flatnonzero(weights)
        if self.nonzero is None or not np.array_equal(nonzero, self.nonzero):
            self.nonzero = nonzero
            self.numbers = self._numbers(nonzero, weights.shape)
            self.transpose = self.numbers.tocsc()
        values, shape = weights.ravel()[nonzero], self.numbers.shape
        return _csr(self.numbers, values, shape), _csr(self.transpose, values, shape[::-1])

    def _numbers(self, nonzero: np.ndarray, shape: tuple[int, ...]) -> sparse.csr_array:
        """Return a matrix with the index of its nonzero weight at each entry."""
        output, channel, tap = (part.astype(np.int32) for part in np.unravel_index(nonzero, shape))
        met = self.pixel_of[:, tap]  # out pixels x nonzero weights, in the order of outputs
        there = met >= 0
        where = np.flatnonzero(there)
        columns = (met * np.int32(shape[1]) + channel).ravel()[where]
        number = np.broadcast_to(np.arange(len(nonzero), dtype=np.int32), met.shape)
        # A row is (out pixel, output). It starts after all entries of earlier weights.
        before = np.zeros((len(met), len(nonzero) + 1), dtype=np.int32)
        np.cumsum(there, axis=1, out=before[:, 1:])
        starts = before[:, np.searchsorted(output, np.arange(shape[0]))]
        starts += np.cumsum(before[:, -1:], axis=0, dtype=np.int32) - before[:, -1:]
        starts = np.append(starts.ravel(), np.int32(len(where)))
        size = (len(met) * shape[0], self.pixels * shape[1])
        return sparse.csr_array((number.ravel()[where], columns, starts), shape=size)


def _csr(pattern: sparse.csr_array, values: np.ndarray, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(
        torch.from_numpy(pattern.indptr),
        torch.from_numpy(pattern.indices),
        torch.from_numpy(values[pattern.data]),
        shape,
        check_invariants=False,
    )


def _out_size(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Return height and width of the next map."""
    image = torch.empty(1, layer.in_channels, height, width, device="meta")
    weight = torch.empty(layer.weight.shape, device="meta")
    if isinstance(layer, TensorFlowConv2d):
        image = layer.padded(image)
    out = F.conv2d(image, weight, None, layer.stride, layer.padding, layer.dilation)
    return out.shape[2], out.shape[3]
