"""The compact file of a network: only its nonzero weights, and what is needed to build it again.

It is a safetensors file. A tensor of the state dict is stored in the smaller of two forms:

- all its values, under its name;
- its nonzero values in row-major order (NAME.values), and for each of them the gap (NAME.gaps):
  its position less the position of the value before it, or the position itself for the first
  value. Gaps are unsigned integers of 1, 2, 4 or 8 bytes, the fewest that hold the largest gap.

The metadata of the file has one entry, "robsparse.compact": a `Description` as JSON. Batch norm is
stored as it is trained and is not folded into the weights, so that the file gives back the state
dict of the network bit for bit (a negative zero becomes zero). docs/use.md describes the format.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import write_tensors
from robsparse.networks import weights
from robsparse.schema.fields import Strict
from robsparse.study import messages

_KEY = "robsparse.compact"
_GAPS = (np.uint8, np.uint16, np.uint32, np.uint64)


class Description(Strict):
    """What a compact file says about its network."""

    version: Literal[1] = 1
    arch: str = Field(description="name of the architecture")
    arch_params: dict[str, Any] = Field(
        description="its parameters; mean and std are the normalisation, which the network does"
    )
    dataset: str = Field(description="data set of the training")
    image_shape: tuple[int, int, int] = Field(description="channels, height and width of an image")
    classes: int = Field(gt=0, description="number of logits")
    sparse: dict[str, tuple[int, ...]] = Field(
        description="shape of each tensor that is stored as nonzero values and gaps"
    )
    provenance: dict[str, Any] = Field(
        description="study, cell and selection; settings, code and libraries of the training"
    )


def size(state: dict[str, Tensor]) -> int:
    """Return how many bytes the tensors of a state dict take in a compact file."""
    return sum(min(value.nbytes, _sparse_bytes(value, _gaps(value))) for value in state.values())


def write(path: Path, state: dict[str, Tensor], **described: Any) -> Description:
    """Write a compact file, atomically.

    Args:
        path: the file.
        state: the state dict of a network, on the CPU.
        described: the fields of the `Description` but `sparse`.
    """
    arrays: dict[str, np.ndarray] = {}
    sparse: dict[str, tuple[int, ...]] = {}
    for name, value in state.items():
        gaps = _gaps(value)
        if _sparse_bytes(value, gaps) < value.nbytes:
            sparse[name] = tuple(value.shape)
            arrays[f"{name}.values"] = value[value != 0].numpy()
            arrays[f"{name}.gaps"] = gaps.numpy().astype(_gap_type(gaps))
        else:
            arrays[name] = np.array(value.numpy(), order="C")
    description = Description(sparse=sparse, **described)
    write_tensors(path, arrays, {_KEY: description.model_dump_json()})
    return description


def read(path: Path) -> tuple[nn.Module, Description]:
    """Return the network of a compact file, in eval mode, and its description.

    The network has the state dict that was written. No code of the file is executed.

    Raises:
        UsageError: if the file is missing, damaged or no compact file, or does not fit its arch.
    """
    description, arrays = _read(path)
    try:
        params = registry.entry("arch", description.arch).params(**description.arch_params)
    except ValidationError as error:
        line = messages.lines(error, description.arch_params, "arch_params")[0]
        raise UsageError(f"{path}: {line}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    with torch.random.fork_rng(devices=[]):  # the initial weights are not used
        network = models.build(
            description.arch, params, description.image_shape, description.classes
        )
    weights.fill(network, _unpacked(path, arrays, description.sparse, network), path)
    return network.eval(), description


def _read(path: Path) -> tuple[Description, dict[str, np.ndarray]]:
    """Return the description and the arrays of a compact file. Raises UsageError, see `read`."""
    try:
        with safe_open(path, framework="np") as stored:
            text = (stored.metadata() or {}).get(_KEY)
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        message = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: not a readable safetensors file ({message})") from None
    if text is None:
        raise UsageError(
            f"{path}: not a compact file, expected the metadata '{_KEY}'; `robsparse export` "
            "writes such a file"
        )
    try:
        data = json.loads(text)
        return Description.model_validate(data), arrays
    except ValidationError as error:
        raise UsageError(f"{path}: metadata: {messages.lines(error, data)[0]}") from None
    except ValueError as error:
        raise UsageError(f"{path}: metadata '{_KEY}': not valid JSON ({error})") from None


def _unpacked(
    path: Path,
    arrays: dict[str, np.ndarray],
    sparse: dict[str, tuple[int, ...]],
    network: nn.Module,
) -> dict[str, Tensor]:
    """Return the state dict of a compact file. Raises UsageError if values and gaps do not fit."""
    packed = {f"{name}.{part}" for name in sparse for part in ("values", "gaps")}
    for name in sorted(packed - arrays.keys()):
        raise UsageError(f"{path}: '{name}' is missing")
    state = {name: torch.from_numpy(a) for name, a in arrays.items() if name not in packed}
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name, shape in sparse.items():
        if shape != expected.get(name):
            raise UsageError(
                f"{path}: '{name}' has shape {shape}, the arch expects {expected.get(name)}"
            )
        values, gaps = (torch.from_numpy(arrays[f"{name}.{part}"]) for part in ("values", "gaps"))
        dense = torch.zeros(shape, dtype=values.dtype)
        positions = gaps.long().cumsum(0)
        low, high = (int(p) for p in positions.aminmax()) if len(positions) else (0, 0)
        if values.shape != gaps.shape or gaps.ndim != 1 or low < 0 or high >= dense.numel():
            raise UsageError(f"{path}: '{name}.gaps' are not the positions of '{name}.values'")
        dense.view(-1)[positions] = values
        state[name] = dense
    return state


def _gaps(value: Tensor) -> Tensor:
    """Return the distances of the nonzero values (int64), the first one from position 0."""
    positions = value.detach().reshape(-1).nonzero().squeeze(1).cpu()
    return (
        positions.diff(prepend=torch.zeros(1, dtype=torch.int64)) if len(positions) else positions
    )


def _gap_type(gaps: Tensor) -> type[np.unsignedinteger[Any]]:
    """Return the smallest unsigned type that holds all gaps."""
    largest = int(gaps.max()) if len(gaps) else 0
    return next(kind for kind in _GAPS if largest <= np.iinfo(kind).max)


def _sparse_bytes(value: Tensor, gaps: Tensor) -> int:
    """Return the bytes of the nonzero values and their gaps."""
    return len(gaps) * (value.element_size() + np.dtype(_gap_type(gaps)).itemsize)
