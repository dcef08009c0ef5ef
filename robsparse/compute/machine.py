"""The device, threads and precision of this process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robsparse.base.errors import UsageError


def pick_device(wanted: str) -> torch.device:
    """ "auto" is the GPU when there is one. Raises UsageError for "cuda" where there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': torch finds no GPU here, expected 'auto' or 'cpu'")
    available = wanted in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if available else "cpu")


def prepare(threads: int) -> None:
    """Limit torch to this many CPU threads, and let fp32 be fp32 on a GPU until told otherwise."""
    torch.set_num_threads(threads)
    _allow_tf32(False)


def pick_precision(wanted: str, device: torch.device) -> str:
    """What `wanted` comes to on a device: "fp32", "tf32" or "bf16".

    "auto" is bf16 where matrix units make it several times faster (an x86 CPU with AMX, a GPU from
    Ampere on), else fp32. Says so in one line where a wish cannot be had.
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
    known: dict[str, bool] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # not there before torch 2.10
    return bool(known.get("amx_bf16", False))


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in fp32, tf32 or bf16 (autocast: weights stay fp32) inside the block."""
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
    """The device as printed in records and under tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"


def laid_out(x_NCHW: Tensor, precision: str) -> Tensor:
    """Images as the convolutions of that precision want them: those of matrix units, channels last.

    (In fp32, on a CPU, some networks train faster one way and some the other.)
    """
    last = torch.contiguous_format if precision == "fp32" else torch.channels_last
    return x_NCHW.contiguous(memory_format=last)


def precision_note(crafting: str, training: str) -> str:
    """What is said after a device's name about a network that was trained there; fp32 goes unsaid.

    E.g. ", bf16" or ", bf16 while crafting".
    """
    if crafting == training:
        return "" if training == "fp32" else f", {training}"
    parts = {"while crafting": crafting, "in the training pass": training}
    return "".join(f", {name} {where}" for where, name in parts.items() if name != "fp32")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # noqa: PLC0415 (not available on every platform torch runs on)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or elsewhere."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
