"""Sparse tensors on disk: the live values, and how many zeros stand before each. No torch in here.

A tensor `w` of which most is zero becomes `w.values` and `w.gaps`. A gap is written in bytes: 255
for every 255 zeros, then what is left. At a density of 1 % that is about 1.1 bytes a live weight,
beside the 4 of its value.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import safe_open

KEY = "robsparse.packed"  # of the file's metadata: shapes of the packed tensors, as JSON
_ENDLESS = 255


def pack(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, gaps as bytes) of an array of any shape."""
    flat = dense.ravel()
    live = np.flatnonzero(flat)
    zeros = np.diff(live, prepend=-1) - 1
    lengths = zeros // _ENDLESS + 1
    gaps = np.full(lengths.sum(), _ENDLESS, dtype=np.uint8)
    gaps[np.cumsum(lengths) - 1] = zeros % _ENDLESS
    return flat[live], gaps


def unpack(values: np.ndarray, gaps: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The dense array again. Raises ValueError when the three do not fit each other."""
    size = int(np.prod(shape))
    ends = gaps != _ENDLESS
    live = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(ends.sum())
    if values.ndim != 1 or gaps.dtype != np.uint8 or len(live) != len(values):
        raise ValueError(f"{len(values)} values and {len(live)} gaps")
    if len(live) and live[-1] >= size:
        raise ValueError(f"more than the {size} weights of shape {list(shape)}")
    dense = np.zeros(size, dtype=values.dtype)
    dense[live] = values
    return dense.reshape(shape)


def save(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Write arrays as safetensors, packed where that is smaller."""
    stored: dict[str, np.ndarray] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, dense in state.items():
        values, gaps = pack(dense) if dense.ndim > 1 else (dense, dense)
        if dense.ndim > 1 and values.nbytes + gaps.nbytes < dense.nbytes:
            stored |= {f"{name}.values": values, f"{name}.gaps": gaps}
            shapes[name] = dense.shape
        else:
            stored[name] = np.array(dense, order="C")
    safetensors.numpy.save_file(stored, path, {KEY: json.dumps(shapes)} if shapes else None)


def load(path: Path, framework: str = "np") -> dict[str, Any]:
    """Arrays of a safetensors file by name, packed ones dense again (these always NumPy's).

    framework: "np" or "pt" (torch), for the others.

    Raises ValueError when packed tensors do not fit their shapes, and what safetensors raises.
    """
    with safe_open(path, framework=framework) as stored:
        packed = json.loads((stored.metadata() or {}).get(KEY, "{}"))
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name, shape in packed.items():
        try:
            values, gaps = (np.asarray(arrays.pop(f"{name}.{part}")) for part in ("values", "gaps"))
        except KeyError:
            raise ValueError(f"the packed weights '{name}' are not there") from None
        arrays[name] = unpack(values, gaps, tuple(shape))
    return arrays
