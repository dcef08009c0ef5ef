"""Mask overlap: how many nonzero weights two networks have in common. Imports no torch.

The mask of a network marks the prunable weights that are not zero.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robsparse.base.files import read_tensors
from robsparse.records.columns import OVERLAP_COLUMNS
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

_PART = 32_768  # bytes of a packed mask

Saved = tuple[Cell, str]  # a cell and a selection


def mask_overlaps(study: Study, layout: Layout) -> list[dict[str, Any]]:
    """A row with OVERLAP_COLUMNS for every pair of comparable sparse networks with saved weights.

    Two networks are comparable if they have the same data set, arch, objective, sparsity and
    selection, or if they are two selections of one training run. Networks of foreign code are left
    out, because they have other layers.
    """
    groups: dict[tuple[str | float, ...], list[Saved]] = {}
    for cell in study.cells():
        for selection in study.evaluation.selections:
            comparable = cell.sparsity and not study.source(cell.method).foreign
            if comparable and layout.model(cell, selection).exists():
                key = (cell.dataset, cell.arch, cell.objective, cell.sparsity)
                groups.setdefault(key, []).append((cell, selection))
    return [row for key, saved in groups.items() for row in _pairs(key, saved, layout)]


def _pairs(
    key: tuple[str | float, ...], saved: list[Saved], layout: Layout
) -> list[dict[str, Any]]:
    measured, expected = overlaps([read_masks(layout.model(*one)) for one in saved])
    rows = []
    for i, j in itertools.combinations(range(len(saved)), 2):
        (cell_a, selection_a), (cell_b, selection_b) = saved[i], saved[j]
        if cell_a != cell_b and selection_a != selection_b:
            continue
        values = (
            *key,
            *(cell_a.method, cell_a.seed, selection_a),
            *(cell_b.method, cell_b.seed, selection_b),
            float(measured[i, j]),
            float(expected[i, j]),
        )
        rows.append(dict(zip(OVERLAP_COLUMNS, values, strict=True)))
    return rows


def read_masks(path: Path) -> list[np.ndarray]:
    """Masks of the prunable layers (matrices and kernels) of a saved network.

    Returns:
        One uint8 array for each layer, in the order of layer names; eight weights in one byte
        (numpy.packbits).
    """
    state = read_tensors(path, remedy="delete it and train this network again")
    return [np.packbits(state[name] != 0) for name in sorted(state) if state[name].ndim > 1]


def overlaps(masks: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard index of each two masks, and the index to expect of random masks.

    The Jaccard index is weights nonzero in both / weights nonzero in at least one; weights of all
    layers are counted together. It is 1 if all weights of both are zero. The index to expect of
    random masks with as many nonzero weights in each layer is an approximation: the expected
    intersection divided by the union of that intersection, with the size of each layer rounded up
    to a multiple of eight weights.

    Args:
        masks: for each of N networks the packed masks of its layers, see `read_masks`. All networks
            have the same layers.

    Returns:
        Both indices, N×N in [0, 1]. Only the values above the diagonal are set.
    """
    both, counted, chance = (np.zeros((len(masks), len(masks))) for _ in range(3))
    for layer in zip(*masks, strict=True):
        counts = np.array([_count(bits) for bits in layer])
        both += _common(np.stack(layer))
        counted += counts[:, None] + counts[None]
        chance += counts[:, None] * counts[None] / (8 * len(layer[0]))
    return _share(both, counted), _share(chance, counted)


def _share(both: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Intersection over union; 1 for two empty masks. counted: the sum of both counts."""
    either = counted - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def _common(bits: np.ndarray) -> np.ndarray:
    """How many weights of a layer are nonzero in each two networks (N×N above the diagonal).

    bits: packed masks (N×B). They are read in parts that a processor keeps in its cache.
    """
    both = np.zeros((len(bits), len(bits)), dtype=np.int64)
    for start in range(0, bits.shape[1], _PART):
        part = bits[:, start : start + _PART]
        for i in range(len(bits) - 1):
            both[i, i + 1 :] += np.bitwise_count(part[i + 1 :] & part[i]).sum(axis=1, dtype=int)
    return both


def _count(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum())
