"""Compares our methods (folder method/) with the baselines: differences, winners, ranks.

Import path: robsparse.figures.data.compare
"""

import itertools
from typing import Any

import numpy as np
import pandas as pd

from robsparse.figures.data import statistics
from robsparse.figures.data.summary import STRONGEST, Material, stack
from robsparse.figures.data.tidy import GROUP, Group, lines, methods, sparsities
from robsparse.study.study import Study

ALPHA = 1 - statistics.LEVEL
AHEAD, BEHIND, OPEN, ONE_SEED = "ahead", "behind", "not separated", "one seed"


def is_ours(study: Study, method: str) -> bool:
    """Whether the method is one that this suite studies rather than a baseline."""
    if study.is_external(method):
        return False
    return study.entry("method", method).module.startswith("robsparse.method.")


def compare(material: Material, group: Group) -> pd.DataFrame:
    """One row a (sparsity, our method, baseline), in the primary selection.

    Columns, fractions, nan where either side is missing: `ours_accuracy`, `ours_low`, `ours_high`,
    `ours_potentially_unreliable` (why, in words) and the same of `theirs`; `seeds` that both have;
    `difference` of the means, its interval `low` and `high`, paired by seed and image (nan unless
    both have the same seeds); `detectable`, the true difference that so many seeds and images would
    show with probability 0.8; `p` of "no difference" and `p_holm`, corrected for the number of
    rows, both nan with one seed; `verdict`: AHEAD, BEHIND, OPEN, ONE_SEED, or "" where the
    difference is unknown.
    A dense baseline is compared with at every sparsity.
    """
    study, found = material.study, []
    for sparsity in sparsities(study, group):
        for ours in methods(study, group):
            for theirs in methods(study, group):
                if is_ours(study, ours) and not is_ours(study, theirs):
                    found.append(_pair(material, group, sparsity, ours, theirs))
    return _corrected(pd.DataFrame(found))


def ablations(material: Material, group: Group) -> pd.DataFrame:
    """The columns of `compare` for each variant of a method ("ours") and the method ("theirs")."""
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
    """The sparse method that is more accurate than every other one, if there is one.

    Each paired difference must be positive with p < 0.05, corrected for their number by Holm's
    rule. None where any is unknown, and with one seed.
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
    p_values = statistics.holm([np.nan if apart is None else apart.p for apart in found])
    # A comparison with nan is false: an unknown difference does not count.
    return best if all(p < ALPHA for p in p_values) else None


def ranks(material: Material) -> pd.DataFrame:
    """One row a sparse method: its rank by accuracy under the strongest attack, over all cells.

    Columns: `method`, `cells`, and means over the cells of `rank` and of the smallest and largest
    rank that cannot be ruled out, `low` and `high`. A cell is a (group, sparsity) in which at least
    two methods were to be compared and all of them have a result; ties share the mean of their
    ranks. A rank is ruled out by the paired differences of all pairs in the cell (p < 0.05,
    corrected for their number by Holm's rule): a method that k others are ahead of is at best
    number k + 1. With one seed no rank can be ruled out.
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
    """Whether the method of each row is ahead of that of each column (bool M×M)."""
    pairs = list(itertools.combinations(range(len(names)), 2))
    found = [_paired(material, group, (names[i], sparsity), (names[j], sparsity)) for i, j in pairs]
    p_values = statistics.holm([np.nan if apart is None else apart.p for apart in found])
    leads = np.zeros((len(names), len(names)), dtype=bool)
    for (i, j), apart, p in zip(pairs, found, p_values, strict=True):
        if apart is not None and p < ALPHA:
            leads[(i, j) if apart.mean > 0 else (j, i)] = True
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
            line = pd.Series({"potentially_unreliable": ""})
        for name in ("accuracy", "low", "high"):
            pair[f"{side}_{name}"] = line.get(f"{STRONGEST}_{name}", np.nan)
        pair[f"{side}_potentially_unreliable"] = line.potentially_unreliable
    pair["difference"] = pair["ours_accuracy"] - pair["theirs_accuracy"]
    apart = _paired(material, group, *sides.values())
    if apart is None:
        return pair | {"seeds": 0} | dict.fromkeys(("low", "high", "detectable", "p"), np.nan)
    low, high = apart.interval()
    found = {"low": low, "high": high, "detectable": apart.detectable, "p": apart.p}
    return pair | {"seeds": apart.seeds} | found


def _paired(
    material: Material, group: Group, ours: tuple[str, float], theirs: tuple[str, float]
) -> statistics.Difference | None:
    """Our minus their outcome, image for image and seed for seed.

    None unless both have the same seeds.
    """
    results = group.select(material.tidy.results)
    results = results[(results.attack == STRONGEST) & (results.component == "all")]
    results = results[results.selection == material.primary].sort_values("seed")
    stacked, seeds = [], []
    for method, sparsity in (ours, theirs):
        rows = results[(results.method == method) & (results.sparsity == sparsity)]
        key = vars(group) | {"method": method, "sparsity": sparsity, "selection": material.primary}
        stacked.append(stack(key, rows, material.outcomes))
        seeds.append(rows.seed.tolist())
    first, second = stacked
    if seeds[0] != seeds[1] or first is None or second is None:
        return None
    return statistics.difference(first, second)
