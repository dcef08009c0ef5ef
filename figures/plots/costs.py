"""Plots of robust accuracy and of what it costs: active weights and passes in training.

Import path: robsparse.figures.plots.costs
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from robsparse.figures.data.reliability import UNRELIABLE
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import Group, groups, methods, sparsities
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import grades_note, interval_note, plot_caption
from robsparse.figures.text.formats import percent

_ACCURACY, _LOW, _HIGH = (f"{STRONGEST}_{name}" for name in ("accuracy", "low", "high"))
_LETTERS = 6.5  # points, of the labels in the summary


def pareto(material: Material) -> Plot:
    """Accuracy under the strongest attack against active weights in training, with its front."""
    study = material.study
    label = study.label("attack", STRONGEST)
    caption = [
        f"{label} accuracy of every network, mean over seeds, against the active weights that its "
        "training holds: the largest number in any epoch, mean over seeds. Each marker is at its "
        "exact place. To its right is its sparsity, once for neighbours with as many active "
        "weights and the same sparsity. Line: Pareto front, the networks that no other "
        "network surpasses in accuracy with as few or fewer active weights; unreliable networks "
        f"are not on it. Bars: {interval_note(material)}, on the front only; networks outside the "
        "front may differ less from it than these intervals are wide.",
        *grades_note(material, filling=True),
        plot_caption(material, attacked=True, selected=True),
    ]
    rows = material.summary[material.summary.selection == material.primary]
    if _ACCURACY not in rows or rows[[_ACCURACY, "peak_active_weights"]].isna().any(axis=1).all():
        message = f"No network has a {label} accuracy and a number of active weights."
        return style.empty(message, caption[-1:])
    found = groups(study)
    figure, axes = style.panels(len(found), 1, width=6.4, height=4.4)
    handles: dict[str, Line2D] = {}
    for group, [panel] in zip(found, axes, strict=True):
        handles |= _pareto_panel(panel, material, group.select(rows))
        panel.set_title(str(group))
    x = "active weights held in training (peak)"
    style.name_axes(figure, x, f"{label} accuracy (%)")
    return style.finish(
        figure, [*handles.values(), *style.grade_handles(rows.reliability)], caption
    )


def front(rows: pd.DataFrame) -> pd.DataFrame:
    """The Pareto front: no other row has a higher accuracy with as few or fewer active weights.

    Rows without a number, of a failed training or with the grade "unreliable" are left out.

    Returns:
        The rows of the front, from few to many active weights.
    """
    known = rows.dropna(subset=[_ACCURACY, "peak_active_weights"])
    known = known[(known.reliability != UNRELIABLE) & (known.failure == "")]
    known = known.sort_values(["peak_active_weights", _ACCURACY], ascending=[True, False])
    best = known[_ACCURACY].cummax().shift(fill_value=-np.inf)
    return known[known[_ACCURACY] > best]


def _pareto_panel(panel: Axes, material: Material, rows: pd.DataFrame) -> dict[str, Line2D]:
    rows = rows.dropna(subset=[_ACCURACY, "peak_active_weights"])
    ahead, looks = front(rows), style.looks(material.study)
    steps: dict[str, Any] = {
        "drawstyle": "steps-post",
        "color": "0.55",
        "linewidth": 1.0,
        "zorder": 1,
    }
    panel.plot(ahead.peak_active_weights, 100 * ahead[_ACCURACY], **steps)
    for index, row in rows.iterrows():
        look, x, y = looks[row.method], row.peak_active_weights, 100 * row[_ACCURACY]
        if index in ahead.index and not np.isnan(row[_LOW]):
            ends = (100 * row[_LOW], 100 * row[_HIGH])
            panel.vlines(x, *ends, color=look.color, linewidth=1.0, gid=look.gid)
        panel.plot([x], [y], **look.points(row.reliability))
    drawn = pd.concat([rows[_ACCURACY], ahead[_LOW], ahead[_HIGH]])
    panel.set_ylim(max(0.0, 100 * drawn.min() - 8), min(100.0, 100 * drawn.max() + 4))
    names = [_name(material, row) for _, row in ahead.iterrows()]
    _leave_room(panel, rows.peak_active_weights, names[0] if names else "")
    _name_front(panel, material, ahead, names)
    _label_sparsities(panel, rows.drop(ahead.index))
    order = [name for name in looks if name in set(rows.method)]
    return {name: Line2D([], [], **looks[name].line | {"linestyle": "none"}) for name in order}


def _name(material: Material, row: pd.Series) -> str:
    label = material.study.label("method", row.method)
    return label if material.study.is_dense(row.method) else f"{label} {percent(row.sparsity)}"


def _leave_room(panel: Axes, weights: pd.Series, first: str) -> None:
    """Make x logarithmic, with room for the first name on the left and sparsities on the right."""
    left, right = style.text_inches(first, _LETTERS) + 0.2, 0.45
    inches = 0.85 * style.cell_inches(panel)[0]  # the rest is for the y axis
    least, most = math.log10(weights.min()), math.log10(weights.max())
    decades = max(most - least, 0.5) / (inches - left - right)  # for each inch
    panel.set_xscale("log")
    panel.set_xlim(10 ** (least - left * decades), 10 ** (most + right * decades))


def _gap(panel: Axes) -> float:
    """The height of a line of letters in units of the y axis."""
    low, high = panel.get_ylim()
    return 1.4 * _LETTERS / 72 * (high - low) / style.cell_inches(panel)[1]


def _name_front(panel: Axes, material: Material, ahead: pd.DataFrame, names: Sequence[str]) -> None:
    """Write method and sparsity to the upper left of each marker of the front."""
    looks, gap, y = style.looks(material.study), _gap(panel), -math.inf
    for (_, row), name in zip(ahead.iterrows(), names, strict=True):
        y = max(y, 100 * row[_ACCURACY]) + gap  # a name is higher than the name before
        panel.annotate(
            name,
            (row.peak_active_weights, y),
            xytext=(-4, 0),
            textcoords="offset points",
            annotation_clip=False,
            ha="right",
            va="center",
            fontsize=_LETTERS,
            fontweight="bold",
            gid=looks[row.method].gid,
        )


def _label_sparsities(panel: Axes, rows: pd.DataFrame) -> None:
    """Write the sparsity to the right of neighbours with equal weights, and a line beside them."""
    beside = offset_copy(panel.transData, panel.get_figure(root=True), x=5, units="points")
    for x, column in rows.sort_values(_ACCURACY).groupby("peak_active_weights"):
        runs = [
            (sparsity, [100 * row[_ACCURACY] for _, row in own])
            for sparsity, own in itertools.groupby(
                column.iterrows(), key=lambda pair: pair[1].sparsity
            )
        ]
        places = spread([(own[0] + own[-1]) / 2 for _, own in runs], _gap(panel))
        for (sparsity, own), y in zip(runs, places, strict=True):
            panel.vlines(x, own[0], own[-1], color="0.4", linewidth=0.8, transform=beside)
            panel.annotate(
                percent(sparsity),
                (x, y),
                xytext=(7, 0),
                textcoords="offset points",
                annotation_clip=False,
                va="center",
                fontsize=_LETTERS,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move ascending values apart until neighbours differ by `gap`, as little as possible.

    The sum of squares of the moves is the smallest (pool adjacent violators).
    """
    blocks: list[list[float]] = []  # mean and number of the values of each block
    for index, value in enumerate(values):
        blocks.append([value - gap * index, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    level = [mean for mean, count in blocks for _ in range(int(count))]
    return [mean + gap * index for index, mean in enumerate(level)]


def cost(material: Material) -> Plot:
    """Accuracy under the strongest attack, passes and peak active weights of each method."""
    study = material.study
    label = study.label("attack", STRONGEST)
    caption = [
        f"One line for each method. Left: {label} accuracy, mean over seeds; bars: "
        f"{interval_note(material)}. Middle: forward and backward passes over batches, including "
        "crafting and pretraining. Right: the largest number of active weights during training. "
        "The dense network is the same at every sparsity.",
        *grades_note(material, filling=True),
        plot_caption(material, attacked=True, selected=True),
    ]
    rows = material.summary[material.summary.selection == material.primary]
    if _ACCURACY not in rows or rows[[_ACCURACY, "forward_passes"]].isna().any(axis=1).all():
        return style.empty(f"No network has a {label} accuracy and a cost.", caption[-1:])
    rows = rows.assign(passes=rows.forward_passes + rows.backward_passes)
    places = [(group, s) for group in groups(study) for s in sparsities(study, group)]
    most = max(len(methods(study, group)) for group in groups(study))
    height = 0.55 + 0.17 * most
    figure, axes = style.panels(
        len(places), 3, width=2.9, height=height, unbroken=True, scaled=False
    )
    for (group, sparsity), panels in zip(places, axes, strict=True):
        own = group.select(rows)
        own = own[own.sparsity.eq(sparsity) | own.method.map(study.is_dense)]
        _cost_row(panels, material, group, own)
        several = f"{group}, " * (len(groups(study)) > 1)
        panels[0].set_title(f"{several}sparsity {percent(sparsity)}", loc="left")
    names = (f"{label} accuracy (%)", "passes over a batch", "peak active weights")
    for panel, name in zip(axes[-1], names, strict=True):
        panel.set_xlabel(style.fill(name, style.cell_inches(panel)[0]))
    for column, limits in enumerate(_cost_limits(rows)):
        for panels in axes:
            panels[column].set_xlim(*limits)
    return style.finish(figure, style.grade_handles(rows.reliability), caption)


def _cost_limits(rows: pd.DataFrame) -> list[tuple[float, float]]:
    """Limits of accuracy (%), passes and active weights, for all panels."""
    active = rows.peak_active_weights.dropna()
    high = 105 * rows[_HIGH].fillna(rows[_ACCURACY]).max()
    return [
        (0, min(100.0, high)),
        (0, 1.1 * rows.passes.max()),
        (active.min() / 2, active.max() * 2),
    ]


def _cost_row(panels: list[Axes], material: Material, group: Group, rows: pd.DataFrame) -> None:
    """Draw the three panels of one group and sparsity; each method has its own line."""
    looks = style.looks(material.study)
    order = [name for name in methods(material.study, group) if name in set(rows.method)]
    accuracies, passes, active = panels
    active.set_xscale("log")
    style.counts_axis(passes)
    for y, name in enumerate(order):
        row, look = rows[rows.method == name].iloc[0], looks[name]
        if not np.isnan(row[_LOW]):
            bar = (100 * row[_LOW], 100 * row[_HIGH])
            accuracies.hlines(y, *bar, color=look.color, linewidth=1.1, gid=look.gid)
        points = look.points(row.reliability)
        accuracies.plot([100 * row[_ACCURACY]], [y], **points)
        plain = look.line | {"linestyle": "none"}
        passes.hlines(y, 0, row.passes, color=look.color, linewidth=0.8, alpha=0.5, gid=look.gid)
        passes.plot([row.passes], [y], **plain)
        active.plot([row.peak_active_weights], [y], **plain)
    for panel in panels:
        panel.set_yticks(range(len(order)), [looks[name].label for name in order])
        panel.set_ylim(len(order) - 0.4, -0.6)
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0, labelleft=panel is accuracies)
