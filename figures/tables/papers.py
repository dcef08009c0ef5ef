"""Tables of papers: our accuracies and the published ones.

Import path: robsparse.figures.tables.papers
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robsparse.figures.data import published
from robsparse.figures.data.reliability import FINE
from robsparse.figures.data.summary import Material
from robsparse.figures.text.formats import (
    MARKS,
    NONE,
    SMALL,
    accuracy_percent,
    join,
    marked,
    percent,
)
from robsparse.figures.text.markup import bullets, latex, markdown
from robsparse.schema.grid import Axis, Table
from robsparse.study.study import AXES, Study

COLUMNS = [*published.KEYS, "ours", "published", "difference", "source", "reliability"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def contents(material: Material, spec: Table) -> dict[str, str]:
    """Return the table as text for each suffix: .md, .tex and .csv.

    Raises:
        UsageError: if a file of published numbers is damaged, or if the rows and columns of the
            table put several networks into one field.
    """
    table = values(material, spec)
    if table.empty:
        missing = f"No network of this table is in the study. {' '.join(material.study.left_out())}"
        return {
            ".md": f"## {spec.title}\n\n{missing.strip()}\n",
            ".tex": f"% {missing.strip()}\n",
            ".csv": ",".join(COLUMNS) + "\n",
        }
    printed, notes = _printed(material.study, spec, table), _notes(material, spec, table)
    return {
        ".md": f"## {spec.title}\n\n{markdown(printed)}\n\n{bullets(notes)}\n",
        ".tex": latex(
            printed,
            title=spec.title,
            notes=notes,
            label=spec.name,
            text_columns=len(spec.rows),
        ),
        ".csv": table.to_csv(index=False),
    }


def values(material: Material, spec: Table) -> pd.DataFrame:
    """Return our accuracies and the published ones.

    Returns:
        One row for each network, attack and source of a published number. Columns: the keys of a
        published number; `ours` (fraction, mean over seeds), `published`, `difference`
        (ours - published), `source`, `reliability` (the grade). A missing value is nan or "". An
        incomplete attack, e.g. some components of AutoAttack, is compared with no published number.
    """
    sources = [published.read(Path(name)) for name in spec.published]
    theirs = pd.concat(sources) if sources else pd.DataFrame(columns=[*published.COLUMNS, "source"])
    rows = []
    for cell in material.study.cells_of(spec):
        for attack in spec.attacks:
            asked = {"attack": attack, "selection": spec.selection}
            key = material.study.place_in(spec, cell) | asked
            ours, grade = _ours(material, {axis: getattr(cell, axis) for axis in AXES} | asked)
            compared = not material.study.qualifier(attack)
            found = _matching(theirs, key, material.study) if compared else []
            for number, source in found or [(np.nan, "")]:
                rows.append(
                    key
                    | {
                        "ours": ours,
                        "published": number,
                        "difference": ours - number,
                        "source": source,
                        "reliability": grade,
                    }
                )
    return pd.DataFrame(rows, columns=COLUMNS)


def _ours(material: Material, key: dict[str, Any]) -> tuple[float, str]:
    """Our accuracy, and the grade of the network."""
    rows = material.summary
    same = np.logical_and.reduce([rows[k] == v for k, v in key.items() if k != "attack"])
    column = f"{key['attack']}_accuracy"
    if column not in rows or not same.any():
        return np.nan, FINE
    return float(rows[same][column].iloc[0]), rows[same].reliability.iloc[0]


def _matching(theirs: pd.DataFrame, key: dict[str, Any], study: Study) -> list[tuple[float, str]]:
    """Published numbers of the same network under the same attack, with their sources."""
    wanted = key | {"method": study.base("method", key["method"])}
    selection = wanted.pop("selection")
    same = np.logical_and.reduce(
        [(theirs[k] == v) | ((k == "objective") & (theirs[k] == "")) for k, v in wanted.items()]
    )
    same &= published.chosen_alike(theirs, selection)
    return list(zip(theirs[same].accuracy, theirs[same].source, strict=True))


def _printed(study: Study, spec: Table, table: pd.DataFrame) -> pd.DataFrame:
    """Lines of the table as text: "ours / published / difference" in % for every column."""
    letters = dict(zip(_sources(table), _LETTERS, strict=False))
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    columns = [
        " ".join(
            [*(_label(study, axis, v) for axis, v in zip(spec.columns, place, strict=True)), a]
        )
        for place, a in itertools.product(
            dict.fromkeys(table[list(spec.columns)].itertuples(index=False, name=None)),
            (study.label("attack", name) for name in spec.attacks),
        )
    ]
    keys = [*spec.rows, *spec.columns, "attack"]
    for place, rows in table.groupby(keys, sort=False):
        key = dict(zip(keys, place, strict=True))
        line = tuple(_label(study, axis, key[axis]) for axis in spec.rows)
        column = " ".join(_label(study, axis, key[axis]) for axis in spec.columns)
        column += f" {study.label('attack', key['attack'])}"
        lines.setdefault(line, {})[column] = _cell_text(rows, letters)
    return pd.DataFrame(
        [
            dict(zip([a.capitalize() for a in spec.rows], line, strict=True))
            | {column: found.get(column, "") for column in columns}
            for line, found in lines.items()
        ]
    )


def _cell_text(rows: pd.DataFrame, letters: dict[str, str]) -> str:
    ours = accuracy_percent(rows.ours.iloc[0])
    ours = ours if ours == NONE else marked(ours, rows.reliability.iloc[0])
    known = rows[rows.source != ""]
    if known.empty:
        return f"{ours} / {NONE} / {NONE}"
    theirs = ", ".join(
        f"{accuracy_percent(r.published)}({letters[r.source]})" for r in known.itertuples()
    )
    differences = ", ".join(accuracy_percent(r.difference, "+") for r in known.itertuples())
    return f"{ours} / {theirs} / {differences}"


def _label(study: Study, axis: Axis, value: object) -> str:
    if axis == "sparsity":
        return percent(float(str(value)))
    if axis == "objective":
        return str(value)
    return study.label(axis, str(value))


def _sources(table: pd.DataFrame) -> list[str]:
    return [source for source in dict.fromkeys(table.source) if source]


def _notes(material: Material, spec: Table, table: pd.DataFrame) -> list[str]:
    study = material.study
    notes = [SMALL] if study.small else []
    notes += [
        "Accuracy in %: ours / published / difference (ours − published); "
        f"{NONE}: not known or not measured. Ours: first {study.evaluation.n_examples} test "
        f"images, mean over seeds, selection {spec.selection}, eps {study.threat.eps:.5g}.",
    ]
    notes += _variant_notes(study, spec)
    if marks := [f"{MARKS[g]} {g}" for g in dict.fromkeys(table.reliability) if MARKS[g]]:
        notes.append(f"{', '.join(marks)}: the reasons are below the main table.")
    excluded = [study.label("attack", name) for name in spec.attacks if study.qualifier(name)]
    if excluded:
        notes.append(f"Not compared with published numbers: {', '.join(excluded)}.")
    sources = _sources(table)
    if not sources:
        read = ", ".join(spec.published) or "no file"
        notes.append(f"No published number of these networks was found in {read}.")
    files = {Path(name).stem: published.read(Path(name)) for name in spec.published}
    for letter, source in zip(_LETTERS, sources, strict=False):
        notes.append(f"({letter}) {source}: {_differs(study, files[source], table)}.")
    return notes


def _variant_notes(study: Study, spec: Table) -> list[str]:
    """Sentences on the variants that stand in the line of their base: one for each method."""
    variants: dict[str, list[str]] = {}
    for cell in study.cells_of(spec):
        place = study.place_in(spec, cell)
        for axis in spec.as_base:
            if (name := getattr(cell, axis)) != place[axis]:
                variants.setdefault(cell.method, []).append(study.label(axis, name))
    return [
        f"{study.label('method', method)} is trained with {join(labels)}."
        for method, labels in variants.items()
    ]


def _differs(study: Study, theirs: pd.DataFrame, table: pd.DataFrame) -> str:
    """Return how a publication measured its numbers, if this may differ from our measurement."""
    used = theirs[
        theirs.dataset.isin(table.dataset)
        & theirs.arch.isin(table.arch)
        & theirs.method.isin([study.base("method", name) for name in table.method.unique()])
        & published.chosen_alike(theirs, table.selection.iloc[0])
    ]
    words = [join(used["where"]), f"as {join(used.printed_as)}"]
    if (used.eps.dropna() != study.threat.eps).any():
        words.append(f"eps {join(used.eps)}")
    words.append(f"{join(used.n_examples)} test images")
    words.append(f"extra data: {join(used.extra_data)}")
    if chosen := [name for name in used.selection.unique() if name]:
        words.append(f"selection: {join(chosen)} epoch of its authors")
    return "; ".join([*words, *dict.fromkeys(note for note in used.note if note)])
