"""Batch norm in train mode, for maps with images innermost in memory.

A result, with the addition of another map and the ReLU after it, is written in one pass over the
map, and so is the gradient. Statistics have double precision. Every sum has a fixed order, so a
repeated run gives the same bits, with any number of threads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from robsparse.kernels.maps import address, check_list, check_map, compiled, empty_map


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance of each channel over images and pixels: (channels), float64."""

    mean: Tensor
    variance: Tensor


class BatchNorm:
    """Weight and bias for each channel of maps (images, channels, height, width), and eps.

    result = (x - mean) / sqrt(variance + eps) * weight + bias, with the statistics of the map.
    Source: Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1 and the gradients after it.
    All methods raise ValueError if a map has another type, shape or layout.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        """weight, bias: (channels), or None for 1 and 0. eps: above 0."""
        given = (
            None if tensor is None else tensor.detach().contiguous() for tensor in (weight, bias)
        )
        self.weight, self.bias = given
        self.eps = eps

    def output(
        self, x_NCHW: Tensor, other: Tensor | None = None, *, rectified: bool = False
    ) -> tuple[Tensor, Statistics]:
        """Return the result for x plus another map, followed by a ReLU if asked for; statistics.

        Args:
            x_NCHW, other: maps of one shape in the layout of the kernels, float32 or float64.
            rectified: apply the ReLU.
        """
        self._check(x_NCHW, {"the other map": other})
        out, (mean, variance) = _like(x_NCHW), _numbers(x_NCHW)
        compiled().norm(
            *self._shared(x_NCHW, rectified, mean, variance), out.data_ptr(), address(other)
        )
        return out, Statistics(mean, variance)

    def gradients(
        self,
        x_NCHW: Tensor,
        upstream: Tensor,
        statistics: Statistics,
        *,
        rectified: bool = False,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the gradients of x, of the weight, of the bias and of the other map.

        Args:
            x_NCHW, upstream: the map, and the gradient of the result.
            statistics: those that `output` returned.
            rectified: whether a ReLU followed, without another map: its gate is computed again.
            gate: the result, if a ReLU followed the addition of another map.

        Returns:
            Gradients in the type of x. That of the other map is None without a gate: it is
            `upstream`.
        """
        self._check(x_NCHW, {"the gradient": upstream, "the gate": gate})
        gradient, gated = _like(x_NCHW), None if gate is None else _like(x_NCHW)
        weight, bias = _numbers(x_NCHW)
        compiled().norm_gradient(
            *self._shared(x_NCHW, rectified, statistics.mean, statistics.variance),
            gradient.data_ptr(), upstream.data_ptr(), address(gate), address(gated),
            weight.data_ptr(), bias.data_ptr(),
        )  # fmt: skip
        return gradient, weight.to(x_NCHW.dtype), bias.to(x_NCHW.dtype), gated

    def _check(self, x_NCHW: Tensor, maps: dict[str, Tensor | None]) -> None:
        shape, dtype = tuple(x_NCHW.shape), x_NCHW.dtype
        if x_NCHW.ndim != 4 or not x_NCHW.numel() or dtype not in (torch.float32, torch.float64):
            raise ValueError(f"batch norm: {dtype} of shape {shape} is not a map with numbers")
        for name, given in ({"the input": x_NCHW} | maps).items():
            if given is not None:
                check_map("batch norm", name, given, shape, dtype)
        for name, given in (("the weight", self.weight), ("the bias", self.bias)):
            if given is not None:
                check_list("batch norm", name, given, shape[1], dtype)

    def _shared(
        self, x: Tensor, rectified: bool, mean: Tensor, variance: Tensor
    ) -> tuple[object, ...]:
        images, channels, height, width = x.shape
        return (
            height * width, channels, images, self.eps, rectified, x.dtype == torch.float64,
            torch.get_num_threads(), x.data_ptr(), address(self.weight), address(self.bias),
            mean.data_ptr(), variance.data_ptr(),
        )  # fmt: skip


def _like(x_NCHW: Tensor) -> Tensor:
    height, width = x_NCHW.shape[2:]
    return empty_map(x_NCHW, x_NCHW.shape[1], (height, width))


def _numbers(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.empty(2, x_NCHW.shape[1], dtype=torch.float64)
    return both[0], both[1]
