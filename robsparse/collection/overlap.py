"""How much the live sets of two networks have in common; read from files, without torch."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from robsparse.base.files import read_tensors
from robsparse.records.columns import OVERLAP_COLUMNS
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

Saved = tuple[Cell, str]  # a cell and a selection


def overlaps(study: Study, layout: Layout) -> list[dict[str, Any]]:
    """A row with OVERLAP_COLUMNS for every pair of comparable sparse networks that were trained.

    Comparable are networks of the same data set, arch, objective and sparsity, in the same
    selection; and the selections of one network with each other. A network that two cells share
    with itself is left out, and so are networks of foreign code, which have other layers.
    """
    groups: dict[tuple, list[Saved]] = {}
    for cell in study.cells():
        for selection in study.evaluation.selections:
            comparable = cell.sparsity and not study.source(cell.method).foreign
            if comparable and layout.model(cell, selection).exists():
                key = (cell.dataset, cell.arch, cell.objective, cell.sparsity)
                groups.setdefault(key, []).append((cell, selection))
    return [row for key, saved in groups.items() for row in _pairs(key, saved, layout)]


def _pairs(key: tuple, saved: list[Saved], layout: Layout) -> list[dict[str, Any]]:
    live = {one: live_sets(layout.model(*one)) for one in saved}
    rows = []
    for (cell_a, selection_a), (cell_b, selection_b) in itertools.combinations(saved, 2):
        if cell_a != cell_b and selection_a != selection_b:
            continue
        a, b = live[cell_a, selection_a], live[cell_b, selection_b]
        values = (
            *key,
            *(cell_a.method, cell_a.seed, selection_a),
            *(cell_b.method, cell_b.seed, selection_b),
            jaccard(a, b),
            chance(a, b),
        )
        rows.append(dict(zip(OVERLAP_COLUMNS, values, strict=True)))
    return rows


def live_sets(path: Path) -> list[np.ndarray]:
    """Where the prunable weights (matrices and kernels) of a saved network are not zero.

    Packed bits, one array a layer, in the order of their names.
    """
    state = read_tensors(path)
    return [np.packbits(state[name] != 0) for name in sorted(state) if state[name].ndim > 1]


def jaccard(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Live in both over live in either, over all layers of packed bits; 1 if none lives."""
    both = sum(_count(x & y) for x, y in zip(a, b, strict=True))
    either = sum(_count(x | y) for x, y in zip(a, b, strict=True))
    return both / either if either else 1.0


def chance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """About the index of random sets with as many live weights in each layer as a and b have.

    The expected intersection, over the union that goes with it. Layers that are no multiple of
    eight weights long count as if they were.
    """
    sizes = [8 * len(x) for x in a]
    counts = [(_count(x), _count(y)) for x, y in zip(a, b, strict=True)]
    both = sum(i * j / n for (i, j), n in zip(counts, sizes, strict=True))
    either = sum(i + j for i, j in counts) - both
    return both / either if either else 1.0


def _count(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum())
