"""Plot of the accuracies of our networks and of published networks.

Import path: robsparse.figures.plots.leaderboard
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from robsparse.figures.data import published as files
from robsparse.figures.data.reliability import FINE
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import grades_note, interval_note, plot_caption
from robsparse.figures.text.formats import marked, percent, radius
from robsparse.study.study import Study

_PLACE = ["dataset", "arch", "sparsity"]
_OURS, _THEIRS = "#D55E00", "0.35"


def published(material: Material) -> Plot:
    """Plot the accuracy of our and of published networks under the strongest attack.

    There is one panel for each data set, architecture and sparsity.
    """
    study = material.study
    if study.qualifier(STRONGEST):
        label = study.label("attack", STRONGEST)
        general = plot_caption(material, attacked=True, selected=True)
        return style.empty(f"Published numbers are not comparable with {label}.", [general])
    rows = entries(material)
    caption = [
        f"Filled: measured here, with {interval_note(material)}; networks without a marker were "
        "not measured. Hollow: published numbers, from the files in `published` of the tables of "
        "papers; each file has the eps of its numbers. The eps of our numbers is "
        f"{radius(study.threat.eps)}. "
        "Dotted: published networks of other architectures, for comparison.",
        *grades_note(material, filling=False),
        plot_caption(material, attacked=True, selected=True),
    ]
    places = rows[rows.known].drop_duplicates(_PLACE)[_PLACE]
    if places.empty:
        return style.empty("No published number of these networks is known.", caption[-1:])
    columns = min(3, len(places))
    height = 0.9 + 0.19 * int(rows[rows.known].groupby(_PLACE).size().max())
    figure, axes = style.panels(
        -(-len(places) // columns), columns, width=4.0, height=height, scaled=False
    )
    panels = [panel for row in axes for panel in row]
    for panel in panels[len(places) :]:
        panel.set_visible(False)
    for panel, place in zip(panels, places.itertuples(index=False), strict=False):
        same = np.logical_and.reduce([rows[k] == getattr(place, k) for k in _PLACE])
        others = rows[~rows.known & (rows.dataset == place.dataset)]
        _panel(panel, study, rows[same & rows.known], others)
        names = (study.label("dataset", place.dataset), study.label("arch", place.arch))
        panel.set_title(f"{names[0]}, {names[1]}, {percent(place.sparsity)}")
    return style.finish(figure, _legend(bool((~rows.known).any())), caption)


def entries(material: Material) -> pd.DataFrame:
    """Our lines and all published numbers of their data sets under the strongest attack.

    Columns: dataset, arch, sparsity, label, accuracy, low, high (fractions), ours (bool), known
    (bool: the study has a sparse network of this data set, arch and sparsity),
    reliability. A published number that is not known is one of RobustBench.
    """
    ours = _our_entries(material)
    names = dict.fromkeys(name for table in material.study.tables for name in table.published)
    numbers = pd.DataFrame()
    if names:
        numbers = pd.concat([files.read(Path(name)) for name in names])
        numbers = numbers[files.chosen_alike(numbers, material.primary)]
    found = ours + _published_entries(numbers, ours)
    columns = [*_PLACE, "label", "accuracy", "low", "high", "ours", "known"]
    table = pd.DataFrame(found, columns=[*columns, "reliability"])
    return table.astype({"ours": bool, "known": bool})


def _our_entries(material: Material) -> list[dict[str, Any]]:
    study = material.study
    lines = material.summary[material.summary.selection == material.primary]
    return [
        {key: getattr(line, key) for key in _PLACE}
        | {
            "label": f"{study.label('method', line.method)}, {line.objective}",
            "accuracy": getattr(line, f"{STRONGEST}_accuracy", np.nan),
            "low": getattr(line, f"{STRONGEST}_low", np.nan),
            "high": getattr(line, f"{STRONGEST}_high", np.nan),
            "ours": True,
            "known": True,
            "reliability": line.reliability,
        }
        for line in lines.itertuples()
        if not study.is_dense(line.method)
    ]


def _published_entries(numbers: pd.DataFrame, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = {tuple(row[key] for key in _PLACE) for row in ours}
    datasets = {row["dataset"] for row in ours}
    found = []
    for row in numbers.itertuples():
        place = {key: getattr(row, key) for key in _PLACE}
        known = tuple(place.values()) in places
        if row.attack != STRONGEST or row.dataset not in datasets:
            continue
        if known or row.source == "robustbench":
            extra = f", {row.extra_data}" if row.extra_data else ""
            values = {"label": f"{row.printed_as}{extra}", "accuracy": row.accuracy}
            values |= {"low": np.nan, "high": np.nan, "reliability": FINE}
            found.append(place | values | {"ours": False, "known": known})
    return found


def _panel(panel: Axes, study: Study, rows: pd.DataFrame, others: pd.DataFrame) -> None:
    rows = rows.sort_values("accuracy", na_position="first")
    labels = []
    for y, row in enumerate(rows.itertuples()):
        measured = not np.isnan(row.accuracy)
        if row.ours and measured:
            if not np.isnan(row.low):
                panel.hlines(y, 100 * row.low, 100 * row.high, color=_OURS, linewidth=1.2)
            panel.plot(100 * row.accuracy, y, "o", color=_OURS, markersize=6)
        elif measured:
            panel.plot(100 * row.accuracy, y, "o", color=_THEIRS, markerfacecolor="none")
        ours = (
            marked(f"{row.label}, ours", row.reliability) if measured else f"{row.label}, ours: n/a"
        )
        labels.append(ours if row.ours else row.label)
    for other in others.itertuples():
        panel.axvline(100 * other.accuracy, color="0.45", linestyle=(0, (1, 2)), linewidth=1.2)
        panel.text(
            100 * other.accuracy,
            -0.4,
            f"{other.label}\n{other.arch}, {percent(other.sparsity)}",
            fontsize=5,
            ha="right",
            va="bottom",
        )
    panel.set_yticks(range(len(labels)), labels, fontsize=7)
    panel.set_ylim(-0.6, len(labels) - 0.4)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel(f"{study.label('attack', STRONGEST)} accuracy (%)")


def _legend(dotted: bool) -> list[Line2D]:
    plain: dict[str, Any] = {"linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], color=_OURS, label="measured here", **plain),
        Line2D([], [], color=_THEIRS, markerfacecolor="none", label="published", **plain),
    ]
    if dotted:
        look: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 2))}
        handles.append(Line2D([], [], label="published, other architecture", **look))
    return handles
