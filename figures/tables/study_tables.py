"""The main table as Markdown and LaTeX, and the other tables of the report, as text.

Import path: robsparse.figures.tables.study_tables
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from robsparse.figures.data import compare
from robsparse.figures.data.corrupted import accuracies
from robsparse.figures.data.summary import STRONGEST, Material, components
from robsparse.figures.data.tidy import Group, attacks, groups, sparsities
from robsparse.figures.text.formats import (
    FAILED,
    MISSED,
    NONE,
    accuracy_percent,
    join,
    marked,
    percent,
)
from robsparse.figures.text.markup import bullets, markdown
from robsparse.figures.text.notes import table_notes
from robsparse.study.study import Study

_COSTS = {
    "Epochs": "epochs",
    "Forward passes": "forward_passes",
    "Backward passes": "backward_passes",
    "Seconds": "train_seconds",
    "Peak active weights": "peak_active_weights",
    "Training state (bytes)": "training_state_bytes",
    "Peak memory (MB)": "peak_memory_mb",
    "Model (bytes)": "model_bytes",
}


def main(material: Material, group: Group) -> pd.DataFrame:
    """The main table of a group as text: one row for each method, sparsity and selection."""
    rows = []
    winners = {s: compare.winner(material, group, s) for s in sparsities(material.study, group)}
    for _, line in group.select(material.summary).iterrows():
        row = {
            "Method": material.study.label("method", line.method),
            "Sparsity": _sparsity(line),
            "Selection": line.selection,
            "Seeds": _seeds(line),
        }
        for attack in attacks(material.study):
            ahead = winners.get(line.sparsity) == line.method
            bold = ahead and attack == STRONGEST and line.selection == material.primary
            row[f"{material.study.label('attack', attack)} (%)"] = _accuracy(line, attack, bold)
        row["Nonzero weights"] = _count(line.nonzero)
        row["Peak active weights"] = _count(line.peak_active_weights)
        rows.append(row)
    return pd.DataFrame(rows)


def _sparsity(line: pd.Series) -> str:
    """The requested sparsity, and the reached one (mean over seeds) if it is another."""
    reached = f" ({100 * (1 - line.nonzero / line.prunable):.1f} % reached)" if line.budget else ""
    return percent(line.sparsity) + reached


def _seeds(line: pd.Series) -> str:
    complete = line.seeds == line.seeds_planned
    return f"{line.seeds}" if complete else f"{line.seeds} of {line.seeds_planned}"


def _accuracy(line: pd.Series, attack: str, bold: bool = False) -> str:
    mean, spread = line[f"{attack}_accuracy"], line[f"{attack}_spread"]
    if np.isnan(mean):
        return f"failed {FAILED}" if line.failure else NONE
    text = f"{100 * mean:.1f}" + ("" if np.isnan(spread) else f" ± {100 * spread:.1f}")
    text = f"**{text}**" if bold else text
    marks = {FAILED: line.failure, MISSED: line.budget}
    text = " ".join([text, *(mark for mark, reasons in marks.items() if reasons)])
    return text if attack == "clean" else marked(text, line.reliability)


def _count(value: float) -> str:
    return NONE if np.isnan(value) else f"{value:,.0f}"


def component_table(material: Material, group: Group) -> pd.DataFrame | None:
    """Accuracy in % after each component of the strongest attack; None if it did not run."""
    table = components(material, group)
    names = [n for n in table if n not in ("method", "sparsity", "selection", "reliability")]
    if not names:
        return None
    shown = pd.DataFrame(
        {
            "Method": [material.study.label("method", name) for name in table.method],
            "Sparsity": table.sparsity.map(percent),
            "Selection": table.selection,
        }
    )
    for name in names:
        shown[f"after {name} (%)"] = [
            NONE if np.isnan(share) else marked(accuracy_percent(share), grade)
            for share, grade in zip(table[name], table.reliability, strict=True)
        ]
    return shown


def comparison_table(material: Material, group: Group) -> pd.DataFrame | None:
    """Comparison of our methods with each baseline as text; None if there is no pair."""
    return _pairs_as_text(material.study, compare.compare(material, group), "Method", "Baseline")


def ablation_table(material: Material, group: Group) -> pd.DataFrame | None:
    """Comparison of variants with the plain method as text; None if there is no variant."""
    return _pairs_as_text(material.study, compare.ablations(material, group), "Variant", "Plain")


def _pairs_as_text(
    study: Study, table: pd.DataFrame, ours: str, theirs: str
) -> pd.DataFrame | None:
    if table.empty:
        return None
    rows = [
        {
            "Sparsity": percent(pair.sparsity),
            ours: study.label("method", pair.ours),
            "Accuracy (%)": _side(pair, "ours"),
            theirs: study.label("method", pair.theirs),
            f"{theirs} accuracy (%)": _side(pair, "theirs"),
            "Difference (points)": _with_interval(pair.difference, pair.low, pair.high, "+"),
            "Detectable (points)": accuracy_percent(pair.detectable),
            "p": _p_value(pair.p, pair.seeds),
            "p (Holm)": _p_value(pair.p_holm, pair.seeds),
            "Verdict": pair.verdict or NONE,
        }
        for pair in table.itertuples()
    ]
    return pd.DataFrame(rows)


def _side(pair: Any, side: str) -> str:
    """The accuracy of one side of a pair, with its interval and marks."""
    value, low, high, grade, budget = (
        getattr(pair, f"{side}_{name}")
        for name in ("accuracy", "low", "high", "reliability", "budget")
    )
    return marked(_with_interval(value, low, high), grade) + f" {MISSED}" * bool(budget)


def _p_value(p: float, seeds: int) -> str:
    if np.isnan(p):
        return f"{NONE} (one seed)" if seeds == 1 else NONE
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def cost_table(material: Material, group: Group) -> pd.DataFrame:
    """Cost of training and accuracy of each line of the main table, as text."""
    rows = []
    lines = group.select(material.summary)
    for _, line in lines[lines.selection == material.primary].iterrows():
        row = {
            "Method": material.study.label("method", line.method),
            "Sparsity": _sparsity(line),
        }
        for name, column in _COSTS.items():
            row[name] = _count(line[column])
        if lines.latency_ms.notna().any():
            row["Latency (ms)"] = NONE if np.isnan(line.latency_ms) else f"{line.latency_ms:.3g}"
        if STRONGEST in attacks(material.study):
            row[f"{material.study.label('attack', STRONGEST)} (%)"] = _accuracy(line, STRONGEST)
        rows.append(row)
    return pd.DataFrame(rows)


def sanity_checks_table(material: Material, group: Group) -> pd.DataFrame | None:
    """Results of the sanity checks as text, the worst result of all seeds; None without checks.

    robsparse.evaluation.sanity_checks describes each number.
    """
    checks = group.select(material.tidy.sanity_checks)
    if "examined" not in checks or checks.examined.isna().all():
        return None
    rows = []
    for line, own, row in _primary_lines(material, group, checks):
        row["Images"] = join(own.examined)
        for column, (title, form) in _SANITY_CHECKS.items():
            value = own[column].min() if column.startswith("pgd") else own[column].max()
            row[title] = NONE if np.isnan(value) else form(value)
        row["Reliability"] = marked(line.reliability, line.reliability)
        rows.append(row)
    return pd.DataFrame(rows)


def corruptions_table(material: Material, group: Group) -> pd.DataFrame | None:
    """Accuracy in % on common corruptions, mean over severities; None if not measured."""
    table = accuracies(material, group)
    if table.empty:
        return None
    rows = []
    for _, own, row in _primary_lines(material, group, table):
        row |= {"Images": join(own.images), "Source": join(own.source)}
        for found in own.itertuples():
            name = f"{str(found.corruption).capitalize().replace('_', ' ')} (%)"
            row[name] = _with_interval(found.accuracy, found.low, found.high)
        rows.append(row)
    return pd.DataFrame(rows)


def _primary_lines(
    material: Material, group: Group, table: pd.DataFrame
) -> Iterator[tuple[pd.Series, pd.DataFrame, dict[str, str]]]:
    """For each line of the primary selection: the line, its rows of a table, its first columns."""
    lines = group.select(material.summary)
    for _, line in lines[lines.selection == material.primary].iterrows():
        keys = [key for key in ("method", "sparsity", "selection") if key in table]
        own = table[np.logical_and.reduce([table[key] == line[key] for key in keys])]
        label = material.study.label("method", line.method)
        yield line, own, {"Method": label, "Sparsity": _sparsity(line)}


def rank_table(material: Material) -> pd.DataFrame | None:
    """Ranks over all cells as text; None if no cell has ranks."""
    table = compare.ranks(material)
    if table.empty:
        return None
    labels = [material.study.label("method", name) for name in table.method]
    shown = pd.DataFrame({"Method": labels, "Cells": table.cells.map(str)})
    shown["Mean rank"] = table["rank"].map("{:.1f}".format)
    shown["Not ruled out"] = [f"{row.low:.1f} to {row.high:.1f}" for row in table.itertuples()]
    return shown


def _number(value: float) -> str:
    return f"{value:.3g}"


def _with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    if np.isnan(low):
        return accuracy_percent(value, sign)
    ends = f"{accuracy_percent(low, sign)}, {accuracy_percent(high, sign)}"
    return f"{accuracy_percent(value, sign)} [{ends}]"


def title(material: Material, group: Group) -> str:
    """Heading of a group's main table."""
    return f"{material.study.title} ({group})"


_SANITY_CHECKS: dict[str, tuple[str, Callable[[float], str]]] = {
    "zero_gradient": ("No gradient (%)", accuracy_percent),
    "huge_eps": ("Correct at eps 1 (%)", accuracy_percent),
    "pgd_10": ("PGD-10 (%)", accuracy_percent),
    "pgd_50": ("PGD-50 (%)", accuracy_percent),
    "pgd_200": ("PGD-200 (%)", accuracy_percent),
    "black_box_only": ("Only random search breaks (%)", accuracy_percent),
    "randomness": ("Two passes differ by", _number),
    "nan_logits": ("Outputs NaN", _number),
    "nan_count": ("Pixels NaN", _number),
    "largest_perturbation": ("Largest perturbation (eps)", _number),
}


def main_markdown(material: Material) -> str:
    """The main tables of all groups with their notes, as Markdown."""
    parts = []
    for group in groups(material.study):
        parts += [f"## {title(material, group)}", markdown(main(material, group))]
        parts += [bullets(table_notes(material, group))]
    return "\n\n".join(parts) + "\n"
