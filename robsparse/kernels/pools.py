"""Pooling of maps in any memory format.

Windows that do not overlap are pooled by a kernel if the map has images innermost in memory. torch
would need two copies of the map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robsparse.kernels.library import library
from robsparse.kernels.maps import compiled, empty_map, images_innermost, is_innermost

Pair = tuple[int, int]


def max_pool(x_NCHW: Tensor, kernel_size: Any, stride: Any = None, **options: Any) -> Any:
    """Return `torch.nn.functional.max_pool2d` of these arguments."""
    window = _pair(kernel_size)
    apart = stride is None or _pair(stride) == window
    plain = {**_PLAIN, **options} == _PLAIN
    if apart and plain and _is_for_kernel(x_NCHW, window):
        return _Pooling.apply(x_NCHW, window, False)
    return F.max_pool2d(_for_torch(x_NCHW), kernel_size, stride, **options)


def mean_pool(x_NCHW: Tensor, output_size: Any) -> Tensor:
    """Return `torch.nn.functional.adaptive_avg_pool2d`: means over equal parts of the map."""
    if x_NCHW.ndim == 4 and output_size in (1, (1, 1)):
        return _mean_of_pixels(x_NCHW)
    if x_NCHW.ndim == 4 and None not in _pair(output_size):
        parts, size = _pair(output_size), x_NCHW.shape[2:]
        window = size[0] // parts[0], size[1] // parts[1]
        whole = all(size[i] == parts[i] * window[i] for i in (0, 1))
        if whole and _is_for_kernel(x_NCHW, window):
            return _Pooling.apply(x_NCHW, window, True)
    return F.adaptive_avg_pool2d(_for_torch(x_NCHW), output_size)


_PLAIN = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}


def _mean_of_pixels(x_NCHW: Tensor) -> Tensor:
    """Return the mean of each channel as a map of one pixel."""
    pixels = x_NCHW.permute(2, 3, 1, 0)
    if not pixels.is_contiguous():
        return x_NCHW.mean((2, 3), keepdim=True)
    return pixels.flatten(0, 1).mean(0).t()[:, :, None, None]  # torch is slow in this format


def _is_for_kernel(x_NCHW: Tensor, window: Pair) -> bool:
    return (
        x_NCHW.ndim == 4
        and x_NCHW.is_cpu
        and x_NCHW.dtype in (torch.float32, torch.float64)
        and is_innermost(x_NCHW)
        and all(0 < side <= whole for side, whole in zip(window, x_NCHW.shape[2:], strict=True))
        and library() is not None
    )


def _for_torch(x_NCHW: Tensor) -> Tensor:
    return x_NCHW.contiguous() if x_NCHW.is_cpu else x_NCHW


def _pair(value: Any) -> Pair:
    pair: Any = (value, value) if value is None or isinstance(value, int) else value
    return pair[0], pair[1]


class _Pooling(torch.autograd.Function):
    """The largest number or the mean of each window: (x_NCHW, window, mean) -> y_NCHW.

    Pixels beyond the last window are left out. The first of several largest numbers gets the
    gradient, as in torch.
    """

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, window: Pair, mean: bool) -> Tensor:
        images, channels, height, width = x_NCHW.shape
        size = height // window[0], width // window[1]
        out = empty_map(x_NCHW, channels, size)
        ctx.shared = (
            *size, width, *window, images * channels, mean, x_NCHW.dtype == torch.float64,
            torch.get_num_threads(),
        )  # fmt: skip
        compiled().pool(*ctx.shared, x_NCHW.data_ptr(), out.data_ptr(), 0, 0)
        ctx.save_for_backward(x_NCHW, out)
        ctx.rest = height % window[0] or width % window[1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        x_NCHW, out = ctx.saved_tensors
        upstream = images_innermost(upstream.to(x_NCHW.dtype))
        height, width = x_NCHW.shape[2:]
        gradient = empty_map(x_NCHW, x_NCHW.shape[1], (height, width))
        if ctx.rest:
            gradient.zero_()
        compiled().pool(
            *ctx.shared, x_NCHW.data_ptr(), out.data_ptr(), upstream.data_ptr(), gradient.data_ptr()
        )
        return gradient, None, None
