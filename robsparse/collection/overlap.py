"""Mask overlap: how many nonzero weights two networks have in common. Imports no torch.

The mask of a network marks the prunable weights that are not zero.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from robsparse.base.files import read_tensors
from robsparse.records.columns import OVERLAP_COLUMNS
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

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
    masks = {one: read_masks(layout.model(*one)) for one in saved}
    rows = []
    for (cell_a, selection_a), (cell_b, selection_b) in itertools.combinations(saved, 2):
        if cell_a != cell_b and selection_a != selection_b:
            continue
        a, b = masks[cell_a, selection_a], masks[cell_b, selection_b]
        values = (
            *key,
            *(cell_a.method, cell_a.seed, selection_a),
            *(cell_b.method, cell_b.seed, selection_b),
            jaccard(a, b),
            expected_jaccard(a, b),
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


def jaccard(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Jaccard index of two masks: weights nonzero in both / weights nonzero in at least one.

    Weights of all layers are counted together. The index is 1 if all weights of both are zero.
    """
    both = sum(_count(x & y) for x, y in zip(a, b, strict=True))
    either = sum(_count(x | y) for x, y in zip(a, b, strict=True))
    return both / either if either else 1.0


def expected_jaccard(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Jaccard index to expect of random masks with as many nonzero weights in each layer.

    It is an approximation: the expected intersection divided by the union of that intersection.
    The size of each layer is rounded up to a multiple of eight weights.
    """
    sizes = [8 * len(x) for x in a]
    counts = [(_count(x), _count(y)) for x, y in zip(a, b, strict=True)]
    both = sum(i * j / n for (i, j), n in zip(counts, sizes, strict=True))
    either = sum(i + j for i, j in counts) - both
    return both / either if either else 1.0


def _count(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum())
