"""The main table for a column of a paper, and its notes.

Import path: robsparse.figures.tables.one_column
"""

import itertools

import numpy as np
import pandas as pd

from robsparse.figures.data import reliability
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import Group, attacks, groups, seeds, sparsities
from robsparse.figures.text.formats import FAILED, MARKS, MISSED, NONE, objective, percent, radius
from robsparse.figures.text.markup import escape_latex
from robsparse.figures.text.notes import table_notes

_MEANING = (
    "Bold: the highest mean of the sparse methods at a sparsity; underlined: the second highest. "
    "Unreliable and failed networks are neither. Methods whose means differ may not be separated; "
    "the report has the tests. Weights held: the largest number of active weights in training."
)
_BEST, _SECOND = r"\textbf{%s}", r"\underline{%s}"


def main_latex(material: Material) -> str:
    """One table for each group, as wide as a column of a paper; it needs the package booktabs.

    Accuracy without attack and under the strongest attack, in the primary selection. The best mean
    of the sparse methods at each sparsity is bold, the second best underlined; unreliable and
    failed networks are neither. The notes are in another file, see `notes_latex`.
    """
    tables = [_table(material, group) for group in groups(material.study)]
    return "\n".join(["% Needs \\usepackage{booktabs}. Notes: main_notes.tex", *tables])


def notes_latex(material: Material) -> str:
    """The notes on the main tables as LaTeX text, for an appendix."""
    parts = []
    for group in groups(material.study):
        # In the main table of the report, bold numbers have another meaning.
        notes = [note for note in table_notes(material, group) if not note.startswith("Bold:")]
        items = [rf"\item {escape_latex(note)}" for note in (_MEANING, *notes)]
        head = rf"\paragraph{{{escape_latex(str(group))}}}"
        parts += [head, r"\begin{itemize}", *items, r"\end{itemize}"]
    return "\n".join(parts) + "\n"


def _shown(material: Material) -> list[str]:
    """The attacks of the table: none, and the strongest one that the study has."""
    known = attacks(material.study)
    return list(dict.fromkeys(["clean", STRONGEST if STRONGEST in known else known[-1]]))


def _table(material: Material, group: Group) -> str:
    study = material.study
    shown = _shown(material)
    rows = group.select(material.summary)
    rows = rows[rows.selection == material.primary]
    label = "-".join([study.study, *vars(group).values()])
    heads = ["Sparsity", "Method", *(study.label("attack", name) for name in shown), "Weights held"]
    body = [_lines(material, rows[rows.sparsity == s], shown) for s in _sparsities(material, group)]
    return "\n".join(
        [
            r"\begin{table}[tbp]",
            r"\centering",
            rf"\caption{{{_caption(material, group)}}}",
            rf"\label{{tab:{label}}}",
            r"\vspace{4pt}",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{@{{}}ll{'r' * (len(shown) + 1)}@{{}}}}",
            r"\toprule",
            " & ".join(map(escape_latex, heads)) + r" \\",
            r"\midrule",
            *itertools.chain(*_separated(body)),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _separated(body: list[list[str]]) -> list[list[str]]:
    filled = [lines for lines in body if lines]
    return [lines if i == 0 else [r"\midrule", *lines] for i, lines in enumerate(filled)]


def _sparsities(material: Material, group: Group) -> list[float]:
    return sorted({0.0, *sparsities(material.study, group)})


def _caption(material: Material, group: Group) -> str:
    """Two or three short sentences: what, on which images, with which threat, what marks mean."""
    study, results = material.study, group.select(material.tidy.results)
    images = int(results.n_examples.max()) if len(results) else study.evaluation.n_examples
    count = len(seeds(study, group))
    over = f"mean ± standard deviation of {count} seeds" if count > 1 else "one seed"
    names = [study.label("dataset", group.dataset), study.label("arch", group.arch)]
    text = (
        f"Accuracy (%) on {images:,} test images: {', '.join(names)}, "
        f"{objective(group.objective)}, "
        f"{study.threat.norm} eps {radius(study.threat.eps)}; {over}. "
        "Bold: best, underlined: second best."
    )
    grades = set(group.select(material.summary).reliability)
    for grade in (reliability.LOOK, reliability.UNRELIABLE):
        if grade in grades:
            text += f" {MARKS[grade]}: {grade}."
    return escape_latex(f"{text} Small study." if study.small else text)


def _lines(material: Material, rows: pd.DataFrame, shown: list[str]) -> list[str]:
    """The lines of one sparsity."""
    decorations = {name: _ranked(material, rows, name) for name in shown}
    found = []
    for place, (index, row) in enumerate(rows.iterrows()):
        cells = [percent(row.sparsity) if place == 0 else "", _method(material, row)]
        cells = [escape_latex(cell).replace(r" \%", r"\,\%") for cell in cells]
        cells += [_accuracy(row, name, decorations[name].get(index, "%s")) for name in shown]
        held = row.peak_active_weights
        cells.append("n/a" if np.isnan(held) else f"{held:,.0f}")
        found.append(" & ".join(cells) + r" \\")
    return found


def _method(material: Material, row: pd.Series) -> str:
    marks = {FAILED: row.failure, MISSED: row.budget}
    signs = [mark for mark, reasons in marks.items() if reasons]
    return " ".join([material.study.label("method", row.method), *signs])


def _ranked(material: Material, rows: pd.DataFrame, attack: str) -> dict[object, str]:
    """Decoration of the best and the second best mean; equal means (as printed) share a place."""
    column = f"{attack}_accuracy"
    if column not in rows or len(rows) < 2:
        return {}
    sparse = rows[~rows.method.map(material.study.is_dense) & (rows.failure == "")]
    if attack != "clean":
        sparse = sparse[sparse.reliability != reliability.UNRELIABLE]
    if len(sparse) < 2:
        return {}
    printed = (100 * sparse[column]).dropna().round(1)
    levels = sorted(set(printed), reverse=True)[:2]
    places = dict(zip(levels, (_BEST, _SECOND), strict=False))
    if (printed == printed.max()).sum() > 1:  # two share the first place: nobody is second
        places = {printed.max(): _BEST}
    return {index: places[value] for index, value in printed.items() if value in places}


def _accuracy(row: pd.Series, attack: str, decoration: str) -> str:
    mean, spread = row.get(f"{attack}_accuracy", np.nan), row.get(f"{attack}_spread", np.nan)
    if np.isnan(mean):
        return NONE
    text = decoration % f"{100 * mean:.1f}"
    if not np.isnan(spread):
        text += rf"\,{{\scriptsize$\pm${100 * spread:.1f}}}"
    if attack == "clean":
        return text
    mark = escape_latex(MARKS[row.reliability]) or r"$^{\phantom{\dagger}}$"
    return text + mark  # an empty mark keeps the numbers of a column in line
