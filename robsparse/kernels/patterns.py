"""Sparse convolutions on a CPU: only the active weights are multiplied.

A `Pattern` has the active positions of a layer for one size of maps, sorted for the kernels. A
`SparseConvolution` is a pattern with values; it computes the three products of a convolution.

Maps have the layout of `robsparse.kernels.maps`. Every sum has a fixed order. So a repeated run
gives the same bits, with any number of threads.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from robsparse.kernels.geometry import Geometry, Side
from robsparse.kernels.maps import address, check_list, check_map, compiled, description, empty_map

_WHAT = "sparse convolution"  # in messages
_ENTRY = {
    torch.float32: np.dtype([("row", np.int32), ("value", np.float32)], align=True),
    torch.float64: np.dtype([("row", np.int32), ("value", np.float64)], align=True),
}


class Lists:
    """The active positions, sorted for one side of a geometry.

    segments: first entry of each segment. slots: number of the position of each entry.
    """

    def __init__(
        self, side: Side, positions: Tensor, weight: tuple[int, ...], dtype: torch.dtype, *,
        transposed: bool,
    ) -> None:  # fmt: skip
        self.side = side
        self.segments = np.empty(side.segments + 1, dtype=np.int32)
        self.slots = np.empty(len(positions), dtype=np.int32)
        self.entries = np.zeros(len(positions), dtype=_ENTRY[dtype])
        compiled().index(
            positions.data_ptr(), len(positions), weight[1], weight[2] * weight[3], transposed,
            side.tap_segment.ctypes.data, side.tap_stride.ctypes.data,
            side.tap_row.ctypes.data, self.segments.ctypes.data, side.segments,
            self.entries.ctypes.data, dtype == torch.float64, self.slots.ctypes.data,
        )  # fmt: skip

    def filled(self, values: Tensor) -> np.ndarray:
        """Return a copy of the entries with these values, one for each position."""
        entries = self.entries.copy()
        double = values.dtype == torch.float64
        compiled().fill(
            entries.ctypes.data, values.data_ptr(), self.slots.ctypes.data, len(entries), double
        )
        return entries


class Pattern:
    """The active positions of a layer, for maps of one size.

    positions: int64, increasing indices into the flat weight (outputs, inputs, height, width).
    dtype: float32 or float64.
    """

    def __init__(self, geometry: Geometry, positions: Tensor, dtype: torch.dtype) -> None:
        """Check the positions.

        Raises:
            ValueError: if there is no kernel for the type, or if the positions are not increasing
                indices on the CPU.
        """
        if dtype not in _ENTRY:
            raise ValueError(f"sparse convolution: float32 or float64 is needed, not {dtype}")
        if positions.dtype != torch.int64 or positions.ndim != 1 or not positions.is_cpu:
            raise ValueError(
                "sparse convolution: positions must be a list of int64 on the CPU, "
                f"not {description(positions)}"
            )
        self.geometry, self.positions, self.dtype = geometry, positions.contiguous(), dtype
        if len(positions) and not (
            positions[0] >= 0
            and positions[-1] < math.prod(geometry.weight)
            and bool((positions[1:] > positions[:-1]).all())
        ):
            raise ValueError(
                "sparse convolution: positions must be increasing indices into a weight of shape "
                f"{geometry.weight}"
            )

    @functools.cached_property
    def forward(self) -> Lists:
        """The lists of the output."""
        g = self.geometry
        return Lists(g.forward, self.positions, g.weight, self.dtype, transposed=False)

    @functools.cached_property
    def backward(self) -> Lists:
        """The lists of the gradient of the input."""
        g = self.geometry
        return Lists(g.backward, self.positions, g.weight, self.dtype, transposed=True)


class SparseConvolution:
    """A pattern with values: the three products of a sparse convolution.

    values: one value for each position of the pattern, of the type of the pattern.
    All methods raise ValueError if a map has another type, shape or layout.
    """

    def __init__(self, pattern: Pattern, values: Tensor) -> None:
        check_list(_WHAT, "values", values, len(pattern.positions), pattern.dtype)
        self.pattern, self.values = pattern, values.contiguous()

    @functools.cached_property
    def _forward(self) -> np.ndarray:
        return self.pattern.forward.filled(self.values)

    @functools.cached_property
    def _backward(self) -> np.ndarray:
        return self.pattern.backward.filled(self.values)

    def output(
        self,
        x_NCHW: Tensor,
        bias: Tensor | None = None,
        other: Tensor | None = None,
        *,
        rectified: bool = False,
    ) -> Tensor:
        """Return the convolution of x plus bias plus another map, followed by a ReLU if asked for.

        Args:
            x_NCHW, other: maps in the layout of the kernels.
            bias: (outputs).
            rectified: apply the ReLU.
        """
        g = self.pattern.geometry
        self._check_map("the input", x_NCHW, len(x_NCHW), g.weight[1], g.size)
        if bias is not None:
            check_list(_WHAT, "the bias", bias, g.weight[0], self.pattern.dtype)
            bias = bias.contiguous()
        if other is not None:
            self._check_map("the other map", other, len(x_NCHW), g.weight[0], g.out)
        out = empty_map(x_NCHW, g.weight[0], g.out)
        compiled().gather(
            *self._shared(self.pattern.forward, self._forward, x_NCHW, out), out.data_ptr(),
            address(bias), address(other), 0, rectified,
        )  # fmt: skip
        return out

    def input_gradient(
        self, upstream: Tensor, other: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """Return the gradient of the input, plus another gradient.

        Args:
            upstream, other: gradients in the layout of the kernels.
            gate: a map like the input. The gradient is 0 where it is 0 or less: the backward pass
                of a ReLU that made it.
        """
        g, images = self.pattern.geometry, len(upstream)
        self._check_map("the gradient", upstream, images, g.weight[0], g.out)
        for name, given in (("the other gradient", other), ("the gate", gate)):
            if given is not None:
                self._check_map(name, given, images, g.weight[1], g.size)
        out = empty_map(upstream, g.weight[1], g.size)
        compiled().gather(
            *self._shared(self.pattern.backward, self._backward, upstream, out), out.data_ptr(),
            0, address(other), address(gate), False,
        )  # fmt: skip
        return out

    def weight_gradient(self, x_NCHW: Tensor, upstream: Tensor) -> Tensor:
        """Return the gradient of each value. Both maps have the layout of the kernels."""
        g, lists = self.pattern.geometry, self.pattern.forward
        self._check_map("the input", x_NCHW, len(x_NCHW), g.weight[1], g.size)
        self._check_map("the gradient", upstream, len(x_NCHW), g.weight[0], g.out)
        gradient = np.zeros(len(lists.slots), dtype=_ENTRY[self.pattern.dtype]["value"])
        compiled().weight_gradient(
            *self._shared(lists, self._forward, x_NCHW, upstream), upstream.data_ptr(),
            gradient.ctypes.data,
        )  # fmt: skip
        by_position = np.empty_like(gradient)
        by_position[lists.slots] = gradient
        return torch.from_numpy(by_position)

    def _check_map(
        self, name: str, x_NCHW: Tensor, images: int, channels: int, size: tuple[int, int]
    ) -> None:
        expected = (images, channels, *size)
        check_map(_WHAT, name, x_NCHW, expected, self.pattern.dtype)

    def _shared(
        self, lists: Lists, entries: np.ndarray, x: Tensor, out: Tensor
    ) -> tuple[object, ...]:
        return (
            *x.shape, out.shape[1], out.shape[2], out.shape[3],
            entries.ctypes.data, lists.segments.ctypes.data, lists.side.phases.ctypes.data,
            lists.side.count, self.pattern.dtype == torch.float64, torch.get_num_threads(),
            x.data_ptr(),
        )  # fmt: skip
