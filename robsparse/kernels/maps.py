"""Maps in the layout of the kernels, and the checks before a call of a kernel.

Maps are tensors x_NCHW with (height, width, channels, images) in memory (`images_innermost`). The
type is float32 or float64.
"""

from types import ModuleType

import torch
from torch import Tensor

from robsparse.kernels.library import library


def images_innermost(x_NCHW: Tensor) -> Tensor:
    """Return x_NCHW in the layout of the kernels. It is copied if it has another one."""
    return x_NCHW.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def is_innermost(x_NCHW: Tensor) -> bool:
    """Return whether x_NCHW has the layout of the kernels."""
    return x_NCHW.permute(2, 3, 1, 0).is_contiguous()


def empty_map(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Return an empty map for the images of `like` in the layout of the kernels."""
    return like.new_empty((*size, channels, len(like))).permute(3, 2, 0, 1)


def check_map(
    what: str, name: str, x_NCHW: Tensor, expected: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Check the shape, type and layout of a map. what: the operation, for the message.

    Raises:
        ValueError: if it has others than expected.
    """
    if (
        x_NCHW.shape != expected
        or x_NCHW.dtype != dtype
        or not x_NCHW.is_cpu
        or not is_innermost(x_NCHW)
    ):
        raise ValueError(
            f"{what}: {name} must be {dtype} of shape {expected} on the CPU with images innermost "
            f"in memory, not {description(x_NCHW)}"
        )


def check_list(what: str, name: str, values: Tensor, count: int, dtype: torch.dtype) -> None:
    """Check a list of numbers. what: the operation, for the message.

    Raises:
        ValueError: if it has another length, type or device than expected.
    """
    if values.shape != (count,) or values.dtype != dtype or not values.is_cpu:
        raise ValueError(
            f"{what}: {name} must be {count} numbers of {dtype} on the CPU, "
            f"not {description(values)}"
        )


def description(tensor: Tensor) -> str:
    """Return type, shape, device and strides of a tensor, for messages."""
    return (
        f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device} "
        f"with strides {tensor.stride()}"
    )


def address(tensor: Tensor | None) -> int:
    """Return the address of the first number, or 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def compiled() -> ModuleType:
    """Return the compiled module. Callers have asked `library` before."""
    kernels = library()
    assert kernels is not None
    return kernels
