"""The device and threads of this process."""

import torch

from robsparse.errors import UsageError


def pick_device(wanted: str) -> torch.device:
    """ "auto" is the GPU when there is one. Raises UsageError for "cuda" where there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': torch finds no GPU here, expected 'auto' or 'cpu'")
    available = wanted in ("cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda" if available else "cpu")


def set_threads(threads: int) -> None:
    """Limit torch to this many CPU threads."""
    torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    """The device as printed in records and under tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)})"


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # noqa: PLC0415 (not available on every platform torch runs on)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
