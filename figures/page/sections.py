"""What the page of a study shows, as plain data for its template.

Import path: robsparse.figures.page.sections
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import yaml

from robsparse.figures.data import compare, reliability
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import (
    SEEDED_CELL,
    Group,
    attacks,
    cells_at,
    groups,
    lines,
    methods,
    seeds,
    sparsities,
)
from robsparse.figures.page.vectors import THEME, points
from robsparse.figures.plots import style
from robsparse.figures.tables import study_tables
from robsparse.figures.text.formats import (
    MARKS,
    NONE,
    accuracy_percent,
    join,
    percent,
    radius,
)
from robsparse.figures.text.notes import line_name
from robsparse.schema.external import External
from robsparse.schema.fields import Strict
from robsparse.study.cells import Cell

_PROVENANCE = {
    "code": "code_version",
    "uncommitted changes": "code_dirty",
    "made by other code than the collecting code": "other_code",
    "digest of code": "code_digest",
    "digest of settings": "settings_digest",
    "libraries": "libraries",
    "checksum of data": "data_checksum",
    "checksum of weights": "model_checksum",
    "trained on": "train_device",
    "attacked on": "eval_device",
    "origin": "origin",
}
_COST = {
    "epochs": "epochs",
    "selected epoch": "selected_epoch",
    "forward passes": "forward_passes",
    "backward passes": "backward_passes",
    "seconds of training": "train_seconds",
    "peak active weights": "peak_active_weights",
    "training state (bytes)": "training_state_bytes",
    "peak memory (MB)": "peak_memory_mb",
    "nonzero weights": "nonzero",
    "prunable weights": "prunable",
    "multiplications, dense": "dense_macs",
    "multiplications, sparse": "sparse_macs",
    "bytes": "model_bytes",
}
_FAILED, _NO_RESULT = "failed", "no result yet"  # in place of a grade
MOST_NETWORKS = 1500  # that the page describes one by one; with more, a browser takes too long
_DESCRIBED = ("results", "curves", "sanity_checks")  # tables of which a network shows its rows
_Rows = Callable[[Cell], pd.DataFrame]
_WIDTH, _HEIGHT = 360.0, 120.0  # of the curves of one network, in units of their SVG


@dataclass(frozen=True)
class Field:
    """One field of a table: its text, and a number by which it is sorted ("" for text)."""

    text: str
    order: str
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table, and the method that it belongs to ("" if it belongs to none)."""

    method: str
    fields: list[Field]


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    caption: str
    columns: list[str]
    rows: list[Row]


def table(material: Material, caption: str, shown: pd.DataFrame | None) -> Table | None:
    """A table of the report for the page; None if there is none or if it has no row."""
    if shown is None or shown.empty:
        return None
    column = next((c for c in ("Method", "Variant") if c in shown), None)
    if "Baseline" in shown:  # a comparison: the picker chooses the baseline
        column = "Baseline"
    owners = [""] * len(shown)
    if column:
        names = {material.study.label("method", name): name for name in methods(material.study)}
        owners = [names.get(label, "") for label in shown[column]]
    rows = [
        Row(owner, [_field(str(value)) for value in values])
        for owner, values in zip(owners, shown.itertuples(index=False, name=None), strict=True)
    ]
    return Table(caption, [str(name) for name in shown], rows)


def main_table(material: Material, group: Group) -> pd.DataFrame:
    """The main table with the grade of each row, so that rows can be filtered by grade."""
    rows = group.select(material.summary)
    grades = rows.reliability.mask(rows.seeds == 0, _NO_RESULT).mask(rows.failure != "", _FAILED)
    return study_tables.main(material, group).assign(Reliability=grades.tolist())


def _field(text: str) -> Field:
    plain = text.replace("**", "")
    found = re.match(r"[<−+-]?\s?[\d,]+(\.\d+)?", plain)
    number = found[0].replace("−", "-").replace(",", "").lstrip("< ") if found else ""
    missing = plain.startswith((NONE, "failed"))
    return Field(plain, "-1e12" if missing else number, plain != text)


def method_looks(material: Material) -> list[dict[str, str]]:
    """Name, label and colour of each method, for the picker."""
    return [
        {"name": name, "label": look.label, "color": THEME.get(look.color.lower(), look.color)}
        for name, look in style.looks(material.study).items()
    ]


def findings(material: Material) -> list[str]:
    """One sentence for each group and sparsity: the most accurate sparse method, if it is known."""
    study, found = material.study, []
    label, column = study.label("attack", STRONGEST), f"{STRONGEST}_accuracy"
    rows = material.summary[material.summary.selection == material.primary]
    if column not in rows:
        return []
    for group in groups(study):
        for sparsity in sparsities(study, group):
            own = group.select(rows)
            own = own[(own.sparsity == sparsity) & ~own.method.map(study.is_dense)]
            own = own.dropna(subset=column)
            if own.empty:
                continue
            best = own.loc[own[column].idxmax()]
            ahead = compare.winner(material, group, sparsity) == best.method
            verdict = (
                "its lead over every other sparse method has p < 0.05 (Holm)"
                if ahead
                else "at least one other sparse method is not separated from it"
            )
            several = f"{group}, " * (len(groups(study)) > 1)
            found.append(
                f"{several}{percent(sparsity)}: {study.label('method', best.method)} has the "
                f"highest {label} accuracy, {accuracy_percent(best[column])} % "
                f"({best.reliability}); {verdict}."
            )
    return found


def reasons(material: Material) -> list[dict[str, Any]]:
    """Networks that are not "fine", with the grade of each of their reasons."""
    rows = material.tidy.results.drop_duplicates([*SEEDED_CELL, "selection"])
    rows = rows[rows.potentially_unreliable != ""]
    return [
        {
            "method": row.method,
            "network": f"{line_name(material.study, row.method, row.sparsity)}, seed {row.seed}, "
            f"{row.selection}",
            "grade": reliability.grade(row.potentially_unreliable, row.n_examples),
            "reasons": graded(row),
        }
        for row in rows.itertuples()
    ]


def graded(row: Any) -> list[tuple[str, str, str]]:
    """Each reason of a result row, with its grade and the mark of the grade."""
    texts = filter(None, row.potentially_unreliable.split("; "))
    pairs = [(text, reliability.grade_reason(text, row.n_examples)) for text in texts]
    return [(text, grade, MARKS[grade]) for text, grade in pairs]


def failures(material: Material) -> list[dict[str, str]]:
    """Networks whose training failed, and networks without results."""
    return [
        {"method": cell.method, "network": _title(material, cell), "reason": reason}
        for cell, reason in _lacking(material).items()
    ]


def _lacking(material: Material) -> dict[Cell, str]:
    """Why a network failed or has no result, for each such network."""
    rows = material.tidy.results
    done = set(rows[SEEDED_CELL].itertuples(index=False, name=None))
    failed = _by_cell(material.tidy.failures, "reason")
    failed |= _by_cell(rows[rows.failure != ""], "failure")
    found = {}
    for cell in material.study.cells():
        key = tuple(getattr(cell, name) for name in SEEDED_CELL)
        if reason := failed.get(key, "" if key in done else _NO_RESULT):
            found[cell] = reason
    return found


def _by_cell(table: pd.DataFrame, column: str) -> dict[tuple[Any, ...], str]:
    keys = table[SEEDED_CELL].itertuples(index=False, name=None)
    return dict(zip(keys, table[column], strict=True))


def _title(material: Material, cell: Cell) -> str:
    group = Group(cell.dataset, cell.arch, cell.objective)
    several = f", {group}" * (len(groups(material.study)) > 1)
    return f"{line_name(material.study, cell.method, cell.sparsity)}, seed {cell.seed}{several}"


def count_marked(material: Material) -> int:
    """The number of networks with a result whose grade is "look" or "unreliable"."""
    rows = material.tidy.results
    rows = rows[(rows.selection == material.primary) & (rows.potentially_unreliable != "")]
    lacking = {tuple(vars(cell).values()) for cell in _lacking(material)}
    found = set(rows[SEEDED_CELL].itertuples(index=False, name=None))
    return len(found - lacking)


def networks(material: Material) -> list[dict[str, Any]]:
    """A section for each network: measurements, settings, curves, cost, provenance.

    In a study of more than MOST_NETWORKS networks, only those of the first seed of each group.
    """
    study, lacking = material.study, _lacking(material)
    shown = [
        cell
        for group in groups(study)
        for method, sparsity in lines(study, group)
        for cell in cells_at(study, group, method, sparsity)
        if len(study.planned) <= MOST_NETWORKS or cell.seed == seeds(study, group)[0]
    ]
    rows = {name: _by_network(getattr(material.tidy, name)) for name in _DESCRIBED}
    return [_network(material, cell, lacking.get(cell, ""), rows) for cell in shown]


def _network(
    material: Material, cell: Cell, lacks: str, tables: dict[str, _Rows]
) -> dict[str, Any]:
    """The section of a network.

    Args:
        material: the data of the study.
        cell: the network.
        lacks: why it failed or has no result, or "".
        tables: for each table in _DESCRIBED, a function that returns the rows of a network.
    """
    rows = tables["results"](cell)
    primary = rows[rows.selection == material.primary]
    robust = primary[(primary.attack == STRONGEST) & (primary.component == "all")]
    reasons_of = graded(primary.iloc[0]) if len(primary) else []
    first = rows.iloc[0] if len(rows) else None
    grade = reliability.worst(grade for _, grade, _ in reasons_of)
    if lacks:
        grade = _NO_RESULT if lacks == _NO_RESULT else _FAILED
    return {
        "method": cell.method,
        "title": _title(material, cell),
        "anchor": cell.key.replace("/", "-"),
        "accuracy": accuracy_percent(robust.accuracy.iloc[0]) if len(robust) else NONE,
        "grade": grade,
        "lacks": lacks,
        "reasons": reasons_of,
        "measurements": _measurements(material, rows),
        "curve": _curve(tables["curves"](cell)),
        "settings": _settings(material, cell),
        "checks": _checks(tables["sanity_checks"](cell), material.primary),
        "cost": {} if first is None else _known(first, _COST),
        "provenance": {} if first is None else _known(first, _PROVENANCE),
    }


def _by_network(table: pd.DataFrame) -> _Rows:
    """A function that returns the rows of a network."""
    places = table.groupby(SEEDED_CELL, sort=False).indices
    return lambda cell: table.iloc[places.get(tuple(vars(cell).values()), [])]


def _known(row: pd.Series, names: dict[str, str]) -> dict[str, str]:
    """Printed values by printed name; values that are not known are left out."""
    texts = {text: _printed(row[column]) for text, column in names.items() if column in row}
    return {text: value for text, value in texts.items() if value}


def _printed(value: Any) -> str:
    if pd.isna(value) or value == "":
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _measurements(material: Material, rows: pd.DataFrame) -> Table | None:
    """Every measured accuracy of a network, with its count and its interval."""
    shown = [
        {
            "Selection": row.selection,
            "Attack": material.study.label("attack", row.attack),
            "Component": "" if row.component == "all" else row.component,
            "Correct images": f"{row.n_correct:,} of {row.n_examples:,}",
            "Accuracy (%)": accuracy_percent(row.accuracy),
            "95 % interval, images only": f"{accuracy_percent(row.ci_low)} to "
            f"{accuracy_percent(row.ci_high)}",
            "eps": radius(row.eps) if row.eps else "",
            "Steps": join([row.steps]) if pd.notna(row.steps) else "",
            "Seconds": f"{row.attack_seconds:.1f}" if pd.notna(row.attack_seconds) else "",
        }
        for name in attacks(material.study)
        for row in rows[rows.attack == name].itertuples()
    ]
    return table(material, "Measured accuracies", pd.DataFrame(shown))


def _curve(curves: pd.DataFrame) -> dict[str, Any] | None:
    """Polylines of the training of one network; None without a curve."""
    if curves.empty:
        return None
    curves = curves.sort_values("epoch")
    share = curves.active_weights / curves.active_weights.max()
    shown = {"active weights, share of the peak": share}
    for column, text in (("val_robust", "robust accuracy"), ("val_clean", "clean accuracy")):
        if column in curves:
            shown[f"{text}, held-out images"] = curves[column]
    stages = curves.groupby("stage", sort=False).epoch.agg(first="min", last="max")
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "epochs": int(curves.epoch.max()),
        "lines": [
            {"label": label, "points": points(values.astype(float).tolist(), _WIDTH, _HEIGHT)}
            for label, values in shown.items()
        ],
        "stages": [f"{row.Index}: epochs {row.first} to {row.last}" for row in stages.itertuples()],
    }


def _settings(material: Material, cell: Cell) -> str:
    """The resolved settings of one network as YAML; an external model is not trained here."""
    planned = material.study.planned[cell]
    if isinstance(planned.params, External):
        parts: dict[str, Strict] = {"model": planned.params}
    else:
        parts = {
            "method": planned.params,
            "training": planned.training,
            "threat of training": planned.training_threat,
            "augmentation": planned.augmentation,
        }
    values = {name: part.model_dump(mode="json") for name, part in parts.items()}
    return str(yaml.safe_dump(values, sort_keys=False, width=90))


def _checks(checks: pd.DataFrame, selection: str) -> dict[str, str]:
    """Numbers of the sanity checks of one network, in the primary selection."""
    own = checks[checks.selection == selection]
    if own.empty:
        return {}
    row = own.iloc[0].drop([*SEEDED_CELL, "selection"])
    return {str(name): f"{value:.4g}" for name, value in row.items() if pd.notna(value)}
