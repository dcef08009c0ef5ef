"""The random numbers of the whole process, which a network or a method may draw without a generator
of its own: those of torch (dropout), NumPy and Python.
"""

import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    """Start all of them anew from a number >= 0."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (these are the ones meant)
    random.seed(number)


def state(device: torch.device) -> dict[str, Any]:
    """Where they are, in tensors and numbers; of GPUs that of `device`."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    key = numpy["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": numpy | {"state": numpy["state"] | {"key": key}},
        "python": random.getstate(),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Go back to where `state` was taken."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
