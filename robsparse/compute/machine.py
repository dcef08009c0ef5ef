"""The device, the number of threads and the precision that this process computes with."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robsparse.base.errors import UsageError


def pick_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cuda" or "cpu"; "auto" prefers the GPU.

    Raises:
        UsageError: if `wanted` is "cuda" and torch finds no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': torch finds no GPU here, expected 'auto' or 'cpu'")
    available = wanted in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if available else "cpu")


def prepare(threads: int) -> None:
    """Limit torch to this number of CPU threads, keep freed memory, and switch tf32 off on GPUs."""
    torch.set_num_threads(threads)
    _keep_freed_memory()
    _allow_tf32(False)


def _keep_freed_memory() -> None:
    """Let malloc keep the memory of freed tensors in this process.

    By default, glibc gives large blocks back to the system, which clears them page by page at the
    next allocation. Other C libraries have no `mallopt`; there this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


# Numbers of malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def pick_precision(wanted: str, device: torch.device) -> str:
    """Return the precision that is used on a device: "fp32", "tf32" or "bf16".

    "auto" selects bf16 if the device has matrix units for it (an x86 CPU with AMX, or a GPU of the
    generation Ampere or later), and fp32 otherwise. If the device has no tf32, the function prints
    one line and returns "fp32".
    """
    on_gpu = device.type == "cuda"
    ampere = on_gpu and torch.cuda.get_device_capability(device)[0] >= 8
    if wanted == "auto":
        return "bf16" if ampere or (not on_gpu and _has_amx()) else "fp32"
    if wanted == "tf32" and not ampere:
        print(f"precision: {device_name(device)} has no tf32, fp32 instead", flush=True)
        return "fp32"
    return wanted


def _has_amx() -> bool:
    # torch before 2.10 has no get_capabilities.
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("amx_bf16", False))


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in fp32, tf32 or bf16 inside the block. bf16 uses autocast; weights stay fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    _allow_tf32(precision == "tf32")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def device_name(device: torch.device) -> str:
    """Return the name of a device that records and tables print."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"


def fast_memory_format(precision: str) -> torch.memory_format:
    """Return the memory format of images that suits a precision.

    tf32 and bf16 use matrix units, which are faster with channels last. fp32 keeps channels first:
    on a CPU some networks are faster with one format and some with the other.
    """
    return torch.contiguous_format if precision == "fp32" else torch.channels_last


def precision_note(crafting: str, training: str) -> str:
    """Return what tables print about precision after the name of the training device.

    E.g. ", bf16" or ", bf16 while crafting"; empty for fp32.
    """
    if crafting == training:
        return "" if training == "fp32" else f", {training}"
    parts = {"while crafting": crafting, "in the training pass": training}
    return "".join(f", {name} {where}" for where, name in parts.items() if name != "fp32")


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process in MiB.

    On a GPU it is the memory that torch allocated, on a CPU the resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # noqa: PLC0415 (not every platform has this module)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of the GPU or of the CPU was too small."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
