"""Weights on disk: writes safetensors; reads safetensors and state dicts saved by torch."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robsparse.base.errors import UsageError, one_line
from robsparse.base.files import read_tensors, write_tensors

_COUNTER = "num_batches_tracked"


def save(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict (tensors on the CPU) as safetensors, atomically."""
    arrays = {name: np.array(value.numpy(), order="C") for name, value in state.items()}
    write_tensors(path, arrays)


def checksum(state: dict[str, Tensor]) -> str:
    """Return the first 16 hex digits of the SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(as_bytes(value))
    return digest.hexdigest()[:16]


def as_bytes(value: Tensor) -> bytes:
    """Return the bytes of a tensor of any type, also of types that NumPy does not have."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def load_into(model: nn.Module, path: str | Path, match: str = "names") -> None:
    """Fill a plain network with the weights of a file.

    Args:
        model: the network.
        path: a safetensors file, or a file that torch saved. torch's file holds a state dict, or a
            dict with a state dict as its entry "state_dict", "model" or "net".
        match: "names" if the tensors of the file have the names of the network's tensors; "order"
            if they have other names but the same order.

    Raises:
        UsageError: if the file is missing or damaged, would run code, has missing, unexpected or
            differently shaped entries, or holds NaN or infinite values. The network is unchanged.
    """
    fill(model, _read(Path(path)), path, match)


def fill(
    model: nn.Module, tensors: dict[str, Tensor], path: str | Path, match: str = "names"
) -> None:
    """Fill a plain network with tensors by name; path: where they come from. See `load_into`."""
    own = model.state_dict()
    state = {
        name if name in own else name.removeprefix("module."): value
        for name, value in tensors.items()
    }
    if not any(name.endswith(_COUNTER) for name in state):
        # Outputs do not depend on the counters of batch norm, and some files lack them.
        state |= {name: value for name, value in own.items() if name.endswith(_COUNTER)}
    expected = {name: value.shape for name, value in own.items()}
    if match == "order":
        state = _renamed(path, state, own)
    hint = "is the arch the right one?" if match == "order" else _hint(state, own)
    for name in sorted(expected.keys() - state.keys()):
        raise UsageError(f"{path}: the weights '{name}' are missing; {hint}")
    for name in sorted(state.keys() - expected.keys()):
        raise UsageError(f"{path}: unexpected weights '{name}'; {hint}")
    for name, value in state.items():
        if value.shape != expected[name]:
            raise UsageError(
                f"{path}: '{name}' has shape {tuple(value.shape)}, expected {tuple(expected[name])}"
            )
        # Values of the network itself may be infinite, e.g. the mask of an attention layer.
        if not (value.isfinite() | (value == own[name])).all():
            raise UsageError(f"{path}: '{name}' holds NaN or infinite values")
    model.load_state_dict(state)


def _hint(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What to try if tensors have other names: their order, if their shapes fit in this order."""
    shapes = [[v.shape for v in tensors.values() if v.ndim] for tensors in (state, own)]
    if shapes[0] == shapes[1]:
        return "the shapes fit in their order: try match: order (--match order)"
    return "is the arch the right one?"


def _renamed(
    path: str | Path, state: dict[str, Tensor], own: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Give the tensors of a file the names of the network's, in order; keep its own scalars."""
    tensors = [value for value in state.values() if value.ndim]
    names = [name for name, value in own.items() if value.ndim]
    if len(tensors) != len(names):
        raise UsageError(f"{path}: {len(tensors)} tensors, expected {len(names)}, in their order")
    return own | dict(zip(names, tensors, strict=True))


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name. No code of the file is executed."""
    if not path.exists():
        raise UsageError(f"{path}: no such model file")
    if path.suffix == ".safetensors":
        return read_tensors(path, "pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = "weights_only" in str(error) or "Unsupported" in str(error)
        raise UsageError(
            f"{path}: it holds more than tensors and was not opened; expected a state dict "
            "(torch.save(model.state_dict(), FILE)) or safetensors"
            if refused
            else f"{path}: not a readable file of weights"
        ) from None
    except Exception as error:  # of many kinds, if the bytes are random
        raise UsageError(f"{path}: not a readable file of weights ({one_line(error)})") from None
    for wrapper in ("state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(f"{path}: expected a state dict, found {type(content).__name__}")
    return {str(name): value for name, value in content.items()}
