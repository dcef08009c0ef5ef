"""Plain weights on disk: safetensors in, safetensors out, nothing is ever unpickled."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from robsparse.errors import UsageError
from robsparse.records import atomic


def save(path: Path, state: dict[str, Tensor]) -> None:
    """Write a plain state dict atomically."""
    with atomic(path) as temporary:
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, temporary)


def load_into(model: nn.Module, path: Path) -> None:
    """Fill a plain network with the weights of a file.

    Raises UsageError, and leaves the network as it is, when the file is missing or damaged, has
    missing, unexpected or differently shaped entries, or holds NaN or infinite values.
    """
    try:
        state = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such model file") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path}: not a readable safetensors file ({error})") from None
    expected = {name: value.shape for name, value in model.state_dict().items()}
    for name in sorted(expected.keys() - state.keys()):
        raise UsageError(f"{path}: the weights '{name}' are missing; is the arch the right one?")
    for name in sorted(state.keys() - expected.keys()):
        raise UsageError(f"{path}: unexpected weights '{name}'; is the arch the right one?")
    for name, value in state.items():
        if value.shape != expected[name]:
            raise UsageError(
                f"{path}: '{name}' has shape {tuple(value.shape)}, expected {tuple(expected[name])}"
            )
        if not torch.isfinite(value).all():
            raise UsageError(f"{path}: '{name}' holds NaN or infinite values")
    model.load_state_dict(state)
