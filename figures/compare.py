"""Compares the sampled networks (folder method/) with every other method of the study.

Import path: robsparse.figures.compare
"""

from typing import Any

import numpy as np
import pandas as pd

from robsparse.config import Study
from robsparse.figures import statistics
from robsparse.figures.summary import STRONGEST, Material, stack
from robsparse.figures.tidy import Group, lines, methods, sparsities


def is_ours(study: Study, method: str) -> bool:
    """Whether the method is one that this suite studies rather than a baseline."""
    if study.is_external(method):
        return False
    return study.entry("method", method).module.startswith("robsparse.method.")


def compare(material: Material, group: Group) -> pd.DataFrame:
    """One row a (sparsity, our method, baseline), in the primary selection.

    Columns, fractions, nan where either side is missing: `ours_accuracy`, `ours_low`, `ours_high`,
    `ours_suspicious` (why, in words) and the same of `theirs`; `difference` of the means; `low` and
    `high` of the difference, bootstrapped over the same seeds and images of both (nan unless both
    have the same seeds); `overlap` of the two intervals (None if one is missing); `p` of the
    paired test of the two over images and `p_holm`, corrected for the number of rows. A dense
    baseline is compared with at every sparsity.
    """
    study, found = material.study, []
    for sparsity in sparsities(study, group):
        for ours in methods(study, group):
            for theirs in methods(study, group):
                if is_ours(study, ours) and not is_ours(study, theirs):
                    found.append(_pair(material, group, sparsity, ours, theirs))
    return _corrected(pd.DataFrame(found))


def ablations(material: Material, group: Group) -> pd.DataFrame:
    """The same columns for each variant of a method ("ours") against the plain one ("theirs")."""
    study, there = material.study, lines(material.study, group)
    found = [
        _pair(material, group, sparsity, variant, study.base("method", variant))
        for variant, sparsity in there
        if study.base("method", variant) != variant
        and (study.base("method", variant), sparsity) in there
    ]
    return _corrected(pd.DataFrame(found))


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    return table if table.empty else table.assign(p_holm=statistics.holm(table.p.tolist()))


def winner(material: Material, group: Group, sparsity: float) -> str | None:
    """The sparse method that is ahead of every other one, if the intervals say so.

    The interval of each paired difference must leave out zero; None where any is unknown.
    """
    study, rows = material.study, group.of(material.summary)
    column = f"{STRONGEST}_accuracy"
    rows = rows[(rows.sparsity == sparsity) & (rows.selection == material.primary)]
    rows = rows[[not study.is_dense(name) for name in rows.method]]
    if len(rows) < 2 or column not in rows or rows[column].isna().any():
        return None
    best = str(rows.loc[rows[column].idxmax(), "method"])
    others = [name for name in rows.method if name != best]
    lows = [_paired(material, group, (best, sparsity), (o, sparsity))[0] for o in others]
    return best if all(low > 0 for low in lows) else None


def ranks(material: Material) -> pd.DataFrame:
    """One row a sparse method: its rank by accuracy under the strongest attack, over all cells.

    Columns: `method`, `cells`, `mean`, `best` and `worst` rank. A cell is a (group, sparsity) in
    which at least two methods were to be compared and all of them have a result; ties share the
    mean of their ranks.
    """
    found: dict[str, list[float]] = {}
    column = f"{STRONGEST}_accuracy"
    rows = material.summary[material.summary.selection == material.primary]
    if column not in rows:
        return pd.DataFrame()
    rows = rows[[not material.study.is_dense(name) for name in rows.method]]
    for _, cell in rows.groupby(["dataset", "arch", "objective", "sparsity"], sort=False):
        if len(cell) > 1 and cell[column].notna().all():
            placed = cell[column].rank(ascending=False)
            for method, rank in zip(cell.method, placed, strict=True):
                found.setdefault(method, []).append(rank)
    return pd.DataFrame(
        [
            {
                "method": method,
                "cells": len(places),
                "mean": float(np.mean(places)),
                "best": min(places),
                "worst": max(places),
            }
            for method, places in sorted(found.items(), key=lambda item: np.mean(item[1]))
        ]
    )


def _pair(
    material: Material, group: Group, sparsity: float, ours: str, theirs: str
) -> dict[str, Any]:
    dense = material.study.is_dense(theirs)
    sides = {"ours": (ours, sparsity), "theirs": (theirs, 0.0 if dense else sparsity)}
    pair: dict[str, Any] = {"sparsity": sparsity, "ours": ours, "theirs": theirs}
    for side, (method, at) in sides.items():
        line = _line(material, group, method, at)
        pair |= {
            f"{side}_{name}": line[f"{STRONGEST}_{name}"] if line is not None else np.nan
            for name in ("accuracy", "low", "high")
        }
        pair[f"{side}_suspicious"] = line.suspicious if line is not None else ""
    pair["difference"] = pair["ours_accuracy"] - pair["theirs_accuracy"]
    pair["low"], pair["high"], pair["p"] = _paired(material, group, *sides.values())
    ends = [(pair[f"{side}_low"], pair[f"{side}_high"]) for side in sides]
    pair["overlap"] = None if np.isnan(ends).any() else statistics.overlap(*ends)
    return pair


def _line(material: Material, group: Group, method: str, sparsity: float) -> pd.Series | None:
    rows = group.of(material.summary)
    rows = rows[(rows.method == method) & (rows.sparsity == sparsity)]
    rows = rows[rows.selection == material.primary]
    if rows.empty or f"{STRONGEST}_accuracy" not in rows:
        return None
    return rows.iloc[0]


def _paired(
    material: Material, group: Group, ours: tuple[str, float], theirs: tuple[str, float]
) -> tuple[float, float, float]:
    """Bootstrap interval of our minus their outcome, and the p-value that they are alike.

    Image for image and seed for seed; nan unless both have the same seeds.
    """
    results = group.of(material.tidy.results)
    results = results[(results.attack == STRONGEST) & (results.component == "all")]
    results = results[results.selection == material.primary].sort_values("seed")
    stacked, seeds = [], []
    for method, sparsity in (ours, theirs):
        rows = results[(results.method == method) & (results.sparsity == sparsity)]
        key = vars(group) | {"method": method, "sparsity": sparsity, "selection": material.primary}
        stacked.append(stack(key, rows, material.outcomes))
        seeds.append(rows.seed.tolist())
    if seeds[0] != seeds[1] or any(side is None for side in stacked):
        return np.nan, np.nan, np.nan
    apart = stacked[0].astype(int) - stacked[1].astype(int)
    return *statistics.bootstrap_interval(apart), statistics.mcnemar(*stacked)
