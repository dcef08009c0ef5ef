"""Summarises result rows: means, spreads and intervals of each method, sparsity and selection.

Import path: robsparse.figures.data.summary
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robsparse.base.errors import UsageError
from robsparse.figures.data import reliability, statistics
from robsparse.figures.data.tidy import LINE, Group, Outcomes, Tidy, attacks, groups, lines, seeds
from robsparse.schema.evaluation import Selection
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

STRONGEST = "autoattack"


@dataclass(frozen=True)
class Material:
    """The data of all tables and plots.

    summary: one row for each line of the main table, see `summarise`.
    """

    study: Study
    tidy: Tidy
    outcomes: Outcomes
    summary: pd.DataFrame

    @property
    def primary(self) -> Selection:
        """The selection that plots and comparisons use."""
        return next(iter(self.study.evaluation.selections))

    def line(self, group: Group, method: str, sparsity: float) -> pd.Series | None:
        """The summary of a method in the primary selection; dense methods ignore `sparsity`."""
        place = (method, self.study.sparsity_of(method, sparsity), self.primary)
        rows = group.select(self.summary)
        for name, value in zip(("method", "sparsity", "selection"), place, strict=True):
            rows = rows[rows[name] == value]
        return None if rows.empty else rows.iloc[0]

    def outcomes_of_strongest(
        self, group: Group, method: str, sparsity: float
    ) -> tuple[list[int], np.ndarray | None]:
        """Outcomes under the strongest attack in the primary selection: seeds, and S×N bool.

        The outcomes are None if those of a seed are missing.

        Raises:
            UsageError: if an outcome file contradicts its row.
        """
        place = (*vars(group).values(), method, sparsity)
        if place not in self._stacked:
            rows = self._strongest.get(place, self.tidy.results[:0])
            key = dict(zip(LINE, place, strict=True)) | {"selection": self.primary}
            self._stacked[place] = rows.seed.tolist(), stack(key, rows, self.outcomes)
        return self._stacked[place]

    @functools.cached_property
    def _stacked(self) -> dict[tuple[Any, ...], tuple[list[int], np.ndarray | None]]:
        """The outcomes that were asked for: each network is compared with several others."""
        return {}

    @functools.cached_property
    def _strongest(self) -> dict[tuple[Any, ...], pd.DataFrame]:
        """The results of the strongest attack in the primary selection by line, by seed."""
        rows = self.tidy.results
        rows = rows[(rows.attack == STRONGEST) & (rows.component == "all")]
        rows = rows[rows.selection == self.primary].sort_values("seed")
        return dict(iter(rows.groupby(LINE, sort=False)))

    def chance(self, group: Group) -> float | None:
        """Accuracy if the largest class is always predicted; None without an evaluation."""
        known = group.select(self.tidy.results).chance.dropna()
        return None if known.empty else float(known.iloc[0])


def make_material(study: Study, layout: Layout, tidy: Tidy) -> Material:
    """Summarise the tidy tables.

    Raises:
        UsageError: if the tables contradict the outcomes of single images.
    """
    outcomes = Outcomes(layout)
    return Material(study, tidy, outcomes, summarise(study, tidy, outcomes))


COSTS = (
    "epochs",
    "forward_passes",
    "backward_passes",
    "train_seconds",
    "training_state_bytes",
    "peak_memory_mb",
    "model_bytes",
    "latency_ms",
)


def summarise(study: Study, tidy: Tidy, outcomes: Outcomes) -> pd.DataFrame:
    """Summarise the results over seeds.

    Returns:
        One row for each (group, method, sparsity, selection) of the grid, also without a result.
        Accuracies are fractions; they are nan without a result. Columns:
        seeds, seeds_planned: number of seeds with a result and in the grid.
        <attack>_accuracy, _spread: mean and sample standard deviation over seeds.
        <attack>_low, _high: 95 % interval, see data/statistics.py.
        nonzero, prunable, peak_active_weights, COSTS: means over seeds.
        reliability: the worst grade of the seeds, see data/reliability.py.
        potentially_unreliable, failure, budget: as text with the seeds: why the network is
            potentially unreliable, why training failed, which sparsity was missed.
    """
    whole = tidy.results[tidy.results.component == "all"]
    by_line = dict(iter(whole.groupby([*LINE, "selection"], sort=False)))
    found = []
    for group in groups(study):
        planned = len(seeds(study, group))
        for method, sparsity in lines(study, group):
            for selection in study.evaluation.selections:
                key = dict(zip(LINE, (*vars(group).values(), method, sparsity), strict=True))
                key["selection"] = selection
                rows = by_line.get(tuple(key.values()), whole[:0])
                line = _line(study, key, rows.sort_values("seed"), outcomes)
                line["failure"] = "; ".join([*filter(None, [line["failure"]]), *_failed(tidy, key)])
                found.append(key | {"seeds_planned": planned} | line)
    return pd.DataFrame(found)


def _failed(tidy: Tidy, key: dict[str, Any]) -> list[str]:
    """Return why the training of some seeds of a line failed."""
    rows = tidy.failures
    if rows.empty:
        return []
    rows = rows[np.logical_and.reduce([rows[k] == key[k] for k in LINE])]
    return [f"seed {row.seed}: {row.reason}" for row in rows.itertuples()]


def _line(
    study: Study, key: dict[str, Any], rows: pd.DataFrame, outcomes: Outcomes
) -> dict[str, Any]:
    models = rows.drop_duplicates("seed")
    line: dict[str, Any] = {"seeds": len(models)}
    for attack in attacks(study):
        measured = rows[rows.attack == attack]
        mean, spread = statistics.mean_and_spread(measured.accuracy.tolist())
        stacked = stack(key, measured, outcomes)
        interval = (np.nan, np.nan)
        if stacked is not None:
            interval = statistics.accuracy_interval(stacked)
        values = (mean, spread, *interval)
        names = ("accuracy", "spread", "low", "high")
        line |= {f"{attack}_{name}": v for name, v in zip(names, values, strict=True)}
    for column in ("nonzero", "prunable", "peak_active_weights", *COSTS):
        line[column] = models[column].mean() if len(models) else np.nan
    reasons = zip(models.potentially_unreliable, models.n_examples, strict=True)
    line["reliability"] = reliability.worst(reliability.grade(*pair) for pair in reasons)
    for column in ("potentially_unreliable", "failure", "budget"):
        filled = models[models[column] != ""]
        texts = (f"seed {row.seed}: {row[column]}" for _, row in filled.iterrows())
        line[column] = "; ".join(texts)
    return line


def stack(key: dict[str, Any], rows: pd.DataFrame, outcomes: Outcomes) -> np.ndarray | None:
    """Return outcomes of single images for the seeds of a line, in the order of its result rows.

    Args:
        key: dataset, arch, objective, method, sparsity and selection.
        rows: the rows of one attack (all components together), one for each seed.
        outcomes: outcomes of the images of all networks.

    Returns:
        S×N bool; None if there is no row, or if outcomes of a seed are missing.

    Raises:
        UsageError: if an outcome file contradicts its row.
    """
    flags = []
    for _, row in rows.iterrows():
        cell = Cell(
            key["dataset"],
            key["arch"],
            key["method"],
            key["objective"],
            key["sparsity"],
            int(row.seed),
        )
        seen = outcomes.correct(cell, key["selection"], row.attack)
        if seen is None:
            return None
        if (int(seen.sum()), len(seen)) != (row.n_correct, row.n_examples):
            raise UsageError(
                f"{cell.key} {key['selection']}: {row.attack} left {int(seen.sum())} of "
                f"{len(seen)} images correct in the flags file, {row.n_correct} of "
                f"{row.n_examples} in results.csv; run `robsparse collect CONFIG` again"
            )
        flags.append(seen)
    return np.stack(flags) if flags else None


def components(material: Material, group: Group) -> pd.DataFrame:
    """Return the accuracy (fraction, mean over seeds) after each component of the strongest attack.

    Returns:
        One row for each (method, sparsity, selection) with this attack. Columns:
        `reliability`, and one for each component in the order in which they ran.
    """
    rows = group.select(material.tidy.results)
    rows = rows[(rows.attack == STRONGEST) & (rows.component != "all")]
    order = rows.component.unique()
    keys = ["method", "sparsity", "selection"]
    means = rows.groupby([*keys, "component"]).accuracy.mean().unstack("component")
    asked = [s for s, names in material.study.evaluation.selections.items() if STRONGEST in names]
    lines = group.select(material.summary)
    lines = lines.loc[lines.selection.isin(asked), [*keys, "reliability"]]
    return lines.join(means.reindex(columns=order), on=keys)
