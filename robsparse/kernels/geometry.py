"""How a convolution reads its map: the lists of taps for the kernels, without any weight.

The output of a convolution is a sum over taps of weight * input row. The gradient of the input is a
sum of the same kind over the gradient of the output. With a stride of s, the input pixels fall into
s * s phases: pixels whose coordinates have the same remainders modulo s use the same taps.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

Pair = tuple[int, int]

# Limits of `_kernels.c`.
MOST_LINES = 64  # lines of a kernel
MOST_PHASES = 256  # products of the two strides
MOST_ROWS = 2**31 - 1  # rows of a map, and weights: their numbers are int32


@dataclass(frozen=True)
class Axis:
    """One phase along one axis. Pixel j of the phase is pixel first + j * step of the written map.

    count: number of pixels. read_step: step in the read map from pixel j to pixel j + 1.
    taps: (kernel index, offset in the read map), in increasing order of the offset.
    """

    first: int
    step: int
    count: int
    read_step: int
    taps: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class Side:
    """The lists for one of the two sums. All arrays are int32.

    phases: for each phase, the numbers of a `Phase` in `_kernels.c`, then dy and dx.
    segments: number of segments. A segment has the active weights of one output channel and tap.
        The last one has those of taps that no pixel uses: with a map smaller than the stride.
    tap_segment, tap_stride: tap t of channel c has segment tap_segment[t] + c * tap_stride[t].
    tap_row: first row of the pixel of tap t, relative to that of pixel (0, 0).
    """

    phases: np.ndarray
    count: int
    segments: int
    tap_segment: np.ndarray
    tap_stride: np.ndarray
    tap_row: np.ndarray


@dataclass(frozen=True)
class Geometry:
    """A convolution for maps of one size.

    weight: (outputs, inputs, kernel height, kernel width).
    size, out: height and width of the input and the output.
    padding: rows of zeros above the map, columns of zeros to its left. The zeros below and to the
        right follow from `out`.
    """

    weight: tuple[int, int, int, int]
    size: Pair
    out: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: if a number is out of its range, or too large for the kernels.
        """
        outputs, inputs, lines, columns = self.weight
        positive = (*self.weight, *self.size, *self.out, *self.stride, *self.dilation)
        if min(positive) < 1 or min(self.padding) < 0:
            raise ValueError(f"sparse convolution: {self}: numbers must be positive")
        beyond = max(self.padding) + max(lines, columns) * max(self.dilation)  # pixels outside
        rows = (max(self.size + self.out) + beyond) ** 2 * max(inputs, outputs)
        limits = {
            "lines of a kernel": (lines, MOST_LINES),
            "product of the strides": (self.stride[0] * self.stride[1], MOST_PHASES),
            "rows of a map": (rows, MOST_ROWS),
            "weights": (outputs * inputs * lines * columns, MOST_ROWS),
        }
        for what, (found, most) in limits.items():
            if found > most:
                raise ValueError(f"sparse convolution: {self}: {what}: at most {most:,}")

    @functools.cached_property
    def forward(self) -> Side:
        """The lists of the output."""
        axes = [[self._forward_axis(axis)] for axis in (0, 1)]
        return _side(axes[0], axes[1], self.weight[:2], self.weight[2:], self.size[1])

    @functools.cached_property
    def backward(self) -> Side:
        """The lists of the gradient of the input."""
        axes = [self._backward_axes(axis) for axis in (0, 1)]
        return _side(axes[0], axes[1], self.weight[1::-1], self.weight[2:], self.out[1])

    def _forward_axis(self, axis: int) -> Axis:
        taps = tuple(
            (k, k * self.dilation[axis] - self.padding[axis]) for k in range(self.weight[2 + axis])
        )
        return Axis(0, 1, self.out[axis], self.stride[axis], taps)

    def _backward_axes(self, axis: int) -> list[Axis]:
        stride, size = self.stride[axis], self.size[axis]
        axes = []
        for first in range(min(stride, size)):
            offsets = [
                (k, first + self.padding[axis] - k * self.dilation[axis])
                for k in reversed(range(self.weight[2 + axis]))
            ]
            taps = tuple((k, offset // stride) for k, offset in offsets if offset % stride == 0)
            axes.append(Axis(first, stride, -(-(size - first) // stride), 1, taps))
        return axes


def _side(ys: list[Axis], xs: list[Axis], channels: Pair, kernel: Pair, width: int) -> Side:
    """Return the lists of a sum with these phases.

    channels: of the written and of the read map. kernel: its size. width: of the read map.
    """
    tables = [np.zeros(kernel, dtype=np.int32) for _ in range(3)]
    tap_segment, tap_stride, tap_row = tables
    phases: list[int] = []
    segment = 0
    for y, x in itertools.product(ys, xs):
        shape = len(y.taps), len(x.taps)
        phases += [y.first, x.first, y.step, x.step, y.count, x.count, y.read_step, x.read_step]
        phases += [*shape, segment, *(dy for _, dy in y.taps), *(dx for _, dx in x.taps)]
        for (a, (ky, dy)), (b, (kx, dx)) in itertools.product(enumerate(y.taps), enumerate(x.taps)):
            tap_segment[ky, kx] = segment + a * shape[1] + b
            tap_stride[ky, kx] = shape[0] * shape[1]
            tap_row[ky, kx] = (dy * width + dx) * channels[1]
        segment += channels[0] * shape[0] * shape[1]
    tap_segment[tap_stride == 0] = segment
    return Side(
        np.array(phases, dtype=np.int32), len(ys) * len(xs), segment + 1, tap_segment.ravel(),
        tap_stride.ravel(), tap_row.ravel(),
    )  # fmt: skip
