"""Compares our methods (folder method/) with the baselines: differences, winners, ranks.

Import path: robsparse.figures.data.compare
"""

import itertools
from typing import Any

import numpy as np
import pandas as pd

from robsparse.figures.data import statistics
from robsparse.figures.data.reliability import FINE
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import GROUP, Group, lines, methods, sparsities
from robsparse.study.study import Study

ALPHA = 1 - statistics.LEVEL
AHEAD, BEHIND, OPEN, ONE_SEED = "ahead", "behind", "not separated", "one seed"


def is_ours(study: Study, method: str) -> bool:
    """Return whether a method is one of ours (folder method/) and not a baseline."""
    if study.is_external(method):
        return False
    return study.entry("method", method).module.startswith("robsparse.method.")


def compare(material: Material, group: Group) -> pd.DataFrame:
    """Compare our methods with the baselines in the primary selection.

    Returns:
        One row for each (sparsity, our method, baseline); a dense baseline has a row at every
        sparsity. Accuracies and differences are fractions; they are nan if one side has no result.
        Columns:
        ours_accuracy, ours_low, ours_high, theirs_*: mean accuracy and its interval.
        ours_reliability, ours_budget, theirs_*: the grade, see data/reliability.py, and which
            sparsity was missed.
        seeds: number of seeds that both methods have.
        difference, low, high: difference of the means and its interval, paired by seed and image;
            nan unless both have the same seeds.
        detectable: true difference that has p < 0.05 with probability 0.8.
        p, p_holm: p-value of "no difference", and its correction for the number of rows; nan with
            one seed.
        verdict: AHEAD, BEHIND, OPEN or ONE_SEED; "" if the difference is unknown.
    """
    study, found = material.study, []
    for sparsity in sparsities(study, group):
        for ours in methods(study, group):
            for theirs in methods(study, group):
                if is_ours(study, ours) and not is_ours(study, theirs):
                    found.append(_pair(material, group, sparsity, ours, theirs))
    return _corrected(pd.DataFrame(found))


def ablations(material: Material, group: Group) -> pd.DataFrame:
    """Compare each variant of a method ("ours") with the method ("theirs"); see `compare`."""
    study, there = material.study, lines(material.study, group)
    found = [
        _pair(material, group, sparsity, variant, study.base("method", variant))
        for variant, sparsity in there
        if study.base("method", variant) != variant
        and (study.base("method", variant), sparsity) in there
    ]
    return _corrected(pd.DataFrame(found))


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return table
    table = table.assign(p_holm=statistics.holm(table.p.tolist()))
    return table.assign(verdict=[_verdict(row) for row in table.itertuples()])


def _verdict(row: Any) -> str:
    if np.isnan(row.low):
        return ""
    if row.seeds == 1:
        return ONE_SEED
    if row.p_holm >= ALPHA:
        return OPEN
    return AHEAD if row.difference > 0 else BEHIND


def winner(material: Material, group: Group, sparsity: float) -> str | None:
    """Return the sparse method that is more accurate than every other sparse method, or None.

    Each paired difference must be positive with p < 0.05, corrected for their number by Holm's
    rule. The result is None if a difference is unknown, or with one seed.
    """
    study, rows = material.study, group.select(material.summary)
    column = f"{STRONGEST}_accuracy"
    rows = rows[(rows.sparsity == sparsity) & (rows.selection == material.primary)]
    rows = rows[[not study.is_dense(name) for name in rows.method]]
    if len(rows) < 2 or column not in rows or rows[column].isna().any():
        return None
    best = str(rows.loc[rows[column].idxmax(), "method"])
    others = [name for name in rows.method if name != best]
    found = [_paired(material, group, (best, sparsity), (o, sparsity)) for o in others]
    p_values = statistics.holm([np.nan if pair is None else pair.p for pair in found])
    # A comparison with nan is false, so there is no winner if a difference is unknown.
    return best if all(p < ALPHA for p in p_values) else None


def ranks(material: Material) -> pd.DataFrame:
    """Rank the sparse methods by accuracy under the strongest attack, over all cells.

    A cell is a (group, sparsity) with at least two methods, all with a result. Ties get the mean of
    their ranks. The paired differences of all pairs in a cell exclude ranks (p < 0.05, corrected
    for their number by Holm's rule): if k methods are ahead of a method, its best possible rank is
    k + 1. With one seed no rank is excluded.

    Returns:
        One row for each method. Columns: `method`; `cells` (their number); means over the cells of
        `rank`, and of the smallest and largest possible rank, `low` and `high`.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    column = f"{STRONGEST}_accuracy"
    rows = material.summary[material.summary.selection == material.primary]
    if column not in rows:
        return pd.DataFrame()
    rows = rows[[not material.study.is_dense(name) for name in rows.method]]
    for (*place, sparsity), cell in rows.groupby([*GROUP, "sparsity"], sort=False):
        if len(cell) > 1 and cell[column].notna().all():
            leads = _leads(material, Group(*place), sparsity, cell.method.tolist())
            placed = cell[column].rank(ascending=False)
            for index, (method, rank) in enumerate(zip(cell.method, placed, strict=True)):
                behind, ahead = int(leads[:, index].sum()), int(leads[index].sum())
                found.setdefault(method, []).append((rank, 1 + behind, len(cell) - ahead))
    table: list[dict[str, Any]] = [
        {"method": method, "cells": len(places)}
        | dict(zip(("rank", "low", "high"), np.mean(places, axis=0).tolist(), strict=True))
        for method, places in found.items()
    ]
    return pd.DataFrame(sorted(table, key=lambda row: row["rank"]))


def _leads(material: Material, group: Group, sparsity: float, names: list[str]) -> np.ndarray:
    """Return whether the method of each row is ahead of the method of each column (bool M×M)."""
    pairs = list(itertools.combinations(range(len(names)), 2))
    found = [_paired(material, group, (names[i], sparsity), (names[j], sparsity)) for i, j in pairs]
    p_values = statistics.holm([np.nan if pair is None else pair.p for pair in found])
    leads = np.zeros((len(names), len(names)), dtype=bool)
    for (i, j), pair, p in zip(pairs, found, p_values, strict=True):
        if pair is not None and p < ALPHA:
            leads[(i, j) if pair.mean > 0 else (j, i)] = True
    return leads


def _pair(
    material: Material, group: Group, sparsity: float, ours: str, theirs: str
) -> dict[str, Any]:
    dense = material.study.is_dense(theirs)
    sides = {"ours": (ours, sparsity), "theirs": (theirs, 0.0 if dense else sparsity)}
    pair: dict[str, Any] = {"sparsity": sparsity, "ours": ours, "theirs": theirs}
    for side, (method, at) in sides.items():
        line = material.line(group, method, at)
        if line is None or f"{STRONGEST}_accuracy" not in line:
            line = pd.Series({"reliability": FINE, "budget": ""})
        for name in ("accuracy", "low", "high"):
            pair[f"{side}_{name}"] = line.get(f"{STRONGEST}_{name}", np.nan)
        for name in ("reliability", "budget"):
            pair[f"{side}_{name}"] = line[name]
    pair["difference"] = pair["ours_accuracy"] - pair["theirs_accuracy"]
    paired = _paired(material, group, *sides.values())
    if paired is None:
        return pair | {"seeds": 0} | dict.fromkeys(("low", "high", "detectable", "p"), np.nan)
    low, high = paired.interval()
    found = {"low": low, "high": high, "detectable": paired.detectable, "p": paired.p}
    return pair | {"seeds": paired.seeds} | found


def _paired(
    material: Material, group: Group, ours: tuple[str, float], theirs: tuple[str, float]
) -> statistics.Difference | None:
    """Return our outcome minus theirs for each image and seed; None unless the seeds are equal."""
    seeds, (first, second) = zip(
        *(material.outcomes_of_strongest(group, *line) for line in (ours, theirs)), strict=True
    )
    if seeds[0] != seeds[1] or first is None or second is None:
        return None
    return statistics.difference(first, second)
