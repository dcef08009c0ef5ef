"""The global random number generators of torch, NumPy and Python.

A network or a method may use them, e.g. in dropout layers.
"""

import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed all global generators with a number >= 0."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 (the global generator is meant)
    random.seed(number)


def state(device: torch.device) -> dict[str, Any]:
    """Return the states of all global generators as tensors and numbers.

    Of all GPUs only the generator of `device` is included.
    """
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    key = numpy["state"]["key"].tolist()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": numpy | {"state": numpy["state"] | {"key": key}},
        "python": random.getstate(),
    }


def restore(state: dict[str, Any], device: torch.device) -> None:
    """Set all global generators to a state that the function `state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
