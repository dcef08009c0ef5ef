"""Plots of robust accuracy at every eps, and of each class.

Import path: robsparse.figures.plots.details
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from robsparse.figures import measures_distances
from robsparse.figures.data.reliability import FINE
from robsparse.figures.data.statistics import accuracy_interval
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import Group, cells_at, groups, methods, sparsities
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import grades_note, interval_note, plot_caption
from robsparse.figures.text.formats import marked, percent, radius
from robsparse.study.cells import Cell

_BAND_POINTS = 13  # values of eps with an interval, for each network
_FEW_CLASSES = 10
_BEYOND = 1e3  # an eps that is larger than the limit of every panel


def accuracy_against_eps(material: Material) -> Plot:
    """Upper bound of robust accuracy at every eps, from all attacks of one norm together."""
    study = material.study
    general = plot_caption(material, attacked=True, selected=True)
    attack = next(iter(measures_distances(study)), None)
    if attack is None:
        return style.empty("No attack of this study measures smallest perturbations.", [general])
    norm = study.attacks[attack].norm
    names = ", ".join(study.label("attack", name) for name in _attacks_of(material, norm))
    caption = [
        f"Share of test images for which {names} found no perturbation of length eps or less, mean "
        "over seeds. This is an upper bound of robust accuracy at every eps. Dotted: the eps of "
        f"the study, {radius(study.threat.eps)}, and chance. Markers: "
        f"{study.label('attack', STRONGEST)} only. Band: {interval_note(material)}, for each of "
        f"{_BAND_POINTS} eps alone, joined by straight lines. The dense network is the same in "
        "every panel.",
        *grades_note(material, filling=True),
        general,
    ]
    figure, panels = style.grid(material, sharey=True, sharex=True)
    handles: dict[str, Line2D] = {}
    farthest = 0.0
    for group, sparsity, panel in panels:
        found, largest = _eps_panel(panel, material, group, sparsity, norm)
        handles |= found
        farthest = max(farthest, largest)
        panel.set_ylim(0, 100)
        if not found:
            style.no_data(panel)
    for panel in figure.axes:
        panel.set_xlim(0, max(farthest, 1.5 * study.threat.eps))
        panel.xaxis.set_major_locator(MaxNLocator(4))
    style.name_axes(figure, f"eps ({norm}, pixels in [0,1])", "robust accuracy (%), upper bound")
    marked_lines = material.summary[material.summary.selection == material.primary]
    entries = [*handles.values(), *style.grade_handles(marked_lines.reliability)]
    return style.finish(figure, entries, caption)


def _eps_panel(
    panel: Axes, material: Material, group: Group, sparsity: float, norm: str
) -> tuple[dict[str, Line2D], float]:
    """Draw one panel.

    Returns:
        Its legend entries, and an eps that contains 98 % of the perturbations of every network.
    """
    handles, largest = {}, 0.0
    grey: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 2)), "linewidth": 1.2}
    for name, look in style.looks(material.study).items():
        found = [
            lengths
            for cell in cells_at(material.study, group, name, sparsity)
            if (lengths := smallest_perturbations(material, cell, norm)) is not None
        ]
        if not found:
            continue
        eps, share = curve(np.stack(found))
        _band(panel, look, np.stack(found))
        shown = vars(look) | {"marker": ""}
        # The last accuracy is drawn up to the edge of the panel.
        eps, share = np.r_[eps, _BEYOND], np.r_[share, share[-1]]
        handles[name] = panel.plot(eps, 100 * share, **shown, drawstyle="steps-post")[0]
        largest = max(largest, float(np.quantile(eps[:-1], 0.98, method="lower")))
        line = material.line(group, name, sparsity)
        if norm == material.study.threat.norm and line is not None:
            level = 100 * line.get(f"{STRONGEST}_accuracy", np.nan)
            marker = look.points(line.reliability) | {"label": "_strongest"}
            panel.plot(material.study.threat.eps, level, **marker)
    if not handles:
        return {}, 0.0
    if norm == material.study.threat.norm:
        panel.axvline(material.study.threat.eps, **grey)
    chance = material.chance(group)
    if chance is not None:
        handles["chance"] = panel.axhline(100 * chance, **grey, label="chance")
    return handles, largest


def _band(panel: Axes, look: style.Look, lengths: np.ndarray) -> None:
    """Draw the interval of the robust accuracy at some values of eps, for each eps alone.

    Args:
        panel: the panel.
        look: how the method is drawn.
        lengths: smallest perturbations that break each image (S×N, inf where none was found).
    """
    places = np.linspace(0, np.quantile(lengths[np.isfinite(lengths)], 0.99), _BAND_POINTS)
    low, high = np.transpose([accuracy_interval(lengths > eps) for eps in places])
    fill: dict[str, Any] = {"color": look.color, "alpha": 0.1, "linewidth": 0}
    panel.fill_between(places, 100 * low, 100 * high, **fill, gid=look.gid)


def _attacks_of(material: Material, norm: str) -> list[str]:
    """The attacks of the primary selection that perturb images in a norm."""
    study = material.study
    return [
        name
        for name in study.evaluation.selections[material.primary]
        if study.attacks[name].eps and study.attacks[name].norm == norm
    ]


def smallest_perturbations(material: Material, cell: Cell, norm: str) -> np.ndarray | None:
    """Length of the smallest perturbation with which any attack of a norm broke each image.

    An attack that does not measure lengths still gives a bound: an image that it broke needs at
    most its eps. Therefore, at the eps of an attack, the share of images that need a longer
    perturbation is at most the accuracy under that attack. All attacks of the primary selection
    are used.

    Returns:
        Lengths (float N); inf if no attack broke the image, 0 if the clean image is misclassified.
        None if no attack of that norm measured lengths.
    """
    study, outcomes = material.study, material.outcomes
    names = _attacks_of(material, norm)
    measured = [
        lengths.astype(float)
        for name in names
        if (lengths := outcomes.distances(cell, material.primary, name)) is not None
    ]
    if not measured:
        return None
    bounds = [
        np.where(robust, np.inf, study.attacks[name].eps)
        for name in names
        if (robust := outcomes.correct(cell, material.primary, name)) is not None
    ]
    return np.minimum.reduce([*measured, *bounds])


def curve(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Robust accuracy as a step function of eps.

    Args:
        lengths: smallest perturbations that break each image (S×N, inf where none was found).

    Returns:
        Values of eps, ascending from 0, and the share of images that need a longer perturbation.
    """
    ends = np.sort(lengths[np.isfinite(lengths)])
    eps = np.concatenate([[0.0], ends])
    broken = np.searchsorted(np.sort(lengths.ravel()), eps, side="right")
    return eps, 1 - broken / lengths.size


def per_class(material: Material) -> Plot:
    """Plot robust accuracy of each class under the strongest attack, one row for each method."""
    study, label = material.study, material.study.label("attack", STRONGEST)
    table, general = (
        class_accuracies(material),
        plot_caption(material, attacked=True, selected=True),
    )
    if table.empty:
        return style.empty(f"No {label} outcome of single images is available.", [general])
    caption = [
        f"{label} accuracy in % of the attacked test images of each class, mean over seeds. A "
        f"class has {table.images.min()} to {table.images.max()} attacked images.",
        *grades_note(material, filling=False),
        general,
    ]
    found, columns = groups(study), sparsities(study)
    classes = int(table.label.max()) + 1
    height = 0.7 + 0.24 * max(len(methods(study, group)) for group in found)
    width = max(3.0, 1.2 + 0.27 * min(classes, 30))
    figure, axes = style.panels(len(found), len(columns), width=width, height=height, scaled=False)
    picture: AxesImage | None = None
    for group, row in zip(found, axes, strict=True):
        for sparsity, panel in zip(columns, row, strict=True):
            own = group.select(table)
            own = own[own.sparsity.eq(sparsity) | own.method.map(study.is_dense)]
            if sparsity not in sparsities(study, group) or own.empty:
                panel.set_visible(False)
                continue
            picture = _class_panel(panel, material, own)
            panel.set_title(f"{group}\n" * (len(found) > 1) + f"sparsity {percent(sparsity)}")
    if picture is not None:
        shown = [panel for panel in figure.axes if panel.get_visible()]
        figure.colorbar(picture, ax=shown, shrink=0.8, label=f"{label} accuracy (%)")
    return style.finish(figure, [], caption)


def class_accuracies(material: Material) -> pd.DataFrame:
    """Return the accuracy of each class under the strongest attack, in the primary selection.

    Returns:
        One row for each (group, method, sparsity, class `label`). Columns: `accuracy` (fraction,
        mean over seeds), `images` (attacked images of the class), `reliability`.
    """
    rows: dict[tuple[str | float, ...], list[np.ndarray]] = {}
    for cell in material.study.cells():
        labels = material.outcomes.labels(cell, material.primary)
        robust = material.outcomes.correct(cell, material.primary, STRONGEST)
        if labels is None or robust is None:
            continue
        key = (cell.dataset, cell.arch, cell.objective, cell.method, cell.sparsity)
        for label in np.unique(labels):
            rows.setdefault((*key, int(label)), []).append(robust[labels == label])
    names = ["dataset", "arch", "objective", "method", "sparsity", "label"]
    found = [
        dict(zip(names, key, strict=True))
        | {"accuracy": float(np.mean(kept)), "images": len(kept[0])}
        for key, kept in rows.items()
    ]
    table = pd.DataFrame(found, columns=[*names, "accuracy", "images"])
    lines = material.summary[material.summary.selection == material.primary]
    return table.merge(lines[[*names[:-1], "reliability"]], how="left", on=names[:-1])


def _class_panel(panel: Axes, material: Material, table: pd.DataFrame) -> AxesImage:
    study = material.study
    wide = 100 * table.pivot_table(index="method", columns="label", values="accuracy")
    wide = wide.reindex([name for name in methods(study) if name in wide.index])
    picture = panel.imshow(wide, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    grades = table.set_index("method").reliability.fillna(FINE).to_dict()
    labels = [marked(study.label("method", name), grades[name]) for name in wide.index]
    panel.set_yticks(range(len(wide)), labels)
    panel.grid(visible=False)
    panel.set_xlabel("class")
    if len(wide.columns) <= _FEW_CLASSES:
        panel.set_xticks(range(len(wide.columns)), wide.columns)
        for (y, x), value in np.ndenumerate(wide.to_numpy()):
            colour = "white" if value < 50 else "black"
            panel.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    return picture
