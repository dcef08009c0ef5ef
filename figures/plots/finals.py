"""Plots of finished networks: robust accuracy against sparsity, density of each layer.

Import path: robsparse.figures.plots.finals
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from robsparse.figures.data.reliability import FINE
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import Group, groups, methods, sparsities
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import grades_note, interval_note, plot_caption
from robsparse.figures.text.formats import percent

_BAND = 0.36  # methods of a category are spread over this share of its width


def robust_accuracy(material: Material) -> Plot:
    """Accuracy under the strongest attack against sparsity, with intervals; dense as a band."""
    label = material.study.label("attack", STRONGEST)
    caption = [
        f"{label} accuracy: worst case per image over its components, mean over seeds. "
        f"{interval_note(material)}. Dashed line and band: the dense network. Methods are drawn "
        "side by side so that their intervals do not overlap. A cross marks a failed training.",
        *grades_note(material, filling=True),
        plot_caption(material, attacked=True, selected=True),
    ]
    column = f"{STRONGEST}_accuracy"
    rows = material.summary[material.summary.selection == material.primary]
    if column not in rows or rows[column].isna().all():
        return style.empty(f"No {label} accuracy has been measured.", caption[-1:])
    found = groups(material.study)
    figure, axes = style.panels(len(found), 1, width=6.4, height=3.6)
    handles: dict[str, Line2D] = {}
    for group, [panel] in zip(found, axes, strict=True):
        handles |= _accuracy_panel(panel, material, group, group.select(rows))
        panel.set_ylabel(f"{label} accuracy (%)")
    axes[-1][0].set_xlabel("sparsity: share of prunable weights that are zero")
    entries = [*handles.values(), *style.grade_handles(rows.reliability)]
    return style.finish(figure, entries, caption)


def _accuracy_panel(
    panel: Axes, material: Material, group: Group, rows: pd.DataFrame
) -> dict[str, Line2D]:
    study, asked = material.study, sparsities(material.study, group)
    looks = {n: k for n, k in style.looks(study).items() if n in methods(study, group)}
    sparse = [name for name in looks if not study.is_dense(name)]
    handles = {}
    for name, look in looks.items():
        own = rows[rows.method == name].set_index("sparsity")
        if study.is_dense(name):
            handles[name] = _dense_band(panel, look, own.iloc[0])
        else:
            shift = dodge(sparse.index(name), len(sparse))
            handles[name] = _method_line(panel, look, own.reindex(asked), shift)
    chance = material.chance(group)
    if chance is not None:
        grey: dict[str, Any] = {"color": "0.45", "linestyle": (0, (1, 2)), "linewidth": 1.2}
        handles["chance"] = panel.axhline(100 * chance, **grey, label="chance")
    panel.set_title(str(group))
    panel.set_xticks(range(len(asked)), [percent(value) for value in asked])
    panel.set_xlim(-0.5, len(asked) - 0.5)
    panel.grid(visible=False, axis="x")
    panel.set_ylim(0, min(100, 1.08 * panel.dataLim.ymax))
    return handles


def dodge(index: int, count: int) -> float:
    """Offset of the index-th of `count` methods from the middle of its category."""
    return 0.0 if count < 2 else _BAND * (index / (count - 1) - 0.5)


def _dense_band(panel: Axes, look: style.Look, line: pd.Series) -> Line2D:
    level = 100 * line[f"{STRONGEST}_accuracy"]
    low, high = 100 * line[f"{STRONGEST}_low"], 100 * line[f"{STRONGEST}_high"]
    if not np.isnan(low):
        panel.axhspan(low, high, color=look.color, alpha=0.09, linewidth=0, gid=look.gid)
    if line.reliability != FINE and not np.isnan(level):
        panel.plot([-0.5], [level], **look.points(line.reliability) | {"clip_on": False})
    return panel.axhline(level, **vars(look) | {"marker": ""})


def _method_line(panel: Axes, look: style.Look, rows: pd.DataFrame, shift: float) -> Line2D:
    """One line with intervals; a marker without an interval where it is unknown."""
    x = np.arange(len(rows)) + shift
    mean, low, high = (
        100 * rows[f"{STRONGEST}_{name}"].to_numpy() for name in ("accuracy", "low", "high")
    )
    # Rounding may put a mean at the end of its interval slightly outside it.
    arms = np.clip([mean - low, high - mean], 0, None)
    panel.errorbar(x, mean, yerr=arms, fmt="none", ecolor=look.color, elinewidth=1.1, gid=look.gid)
    line = panel.plot(x, mean, **look.line)[0]
    failed = (rows.failure.fillna("") != "").to_numpy()
    panel.plot(x[failed], mean[failed], "x", color="black", markersize=9, zorder=5, gid=look.gid)
    for place, level, grade in zip(x, mean, rows.reliability.fillna(FINE), strict=True):
        if grade != FINE:
            panel.plot([place], [level], **look.points(grade) | {"label": "_grade"})
    return line


def layer_density(material: Material) -> Plot:
    """Share of nonzero weights of each layer of the selected networks, mean over seeds."""
    caption = [
        "Layers in forward order, each with its number of prunable weights. Dotted line: target "
        "density of the whole network. Open marker at the bottom: all weights of the layer "
        "are zero.",
        plot_caption(material, attacked=False, selected=True),
    ]
    layers = material.tidy.layers
    layers = layers[layers.selection == material.primary]
    if layers.empty:
        return style.empty("No layer counts have been collected.", caption[1:])
    layers = layers.assign(density=layers.nonzero / layers["size"])
    shown = 100 * layers.density[(layers.density > 0) & (layers.sparsity > 0)]
    if shown.empty:
        return style.empty("The study has no sparse network.", caption[1:])
    floor, top = shown.min() / 2, shown.max() * 1.4
    figure, panels = style.grid(material, sharey=True)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        if not sparsity:
            panel.set_visible(False)
            continue
        found = _density_panel(panel, material, group.select(layers), sparsity, floor)
        handles |= found
        style.log_axis(panel, floor / 1.2, top, "{x:g}")
        if not found:
            style.no_data(panel)
    style.name_axes(figure, "layer, and its size", "density of the layer (%)")
    return style.finish(figure, handles.values(), caption)


def _density_panel(
    panel: Axes, material: Material, layers: pd.DataFrame, sparsity: float, floor: float
) -> dict[str, Line2D]:
    study = material.study
    looks = {n: look for n, look in style.looks(study).items() if not study.is_dense(n)}
    order = layers.drop_duplicates("layer")
    handles = {}
    for index, (name, look) in enumerate(looks.items()):
        own = layers[(layers.method == name) & (layers.sparsity == sparsity)]
        if own.empty:
            continue
        density = 100 * own.groupby("layer").density.mean().reindex(order.layer).to_numpy()
        x = np.arange(len(order)) + dodge(index, len(looks))
        handles[name] = panel.plot(x, np.where(density > 0, density, np.nan), **look.line)[0]
        all_zero = density == 0
        if all_zero.any():
            hollow = {"markerfacecolor": "none", "markeredgecolor": look.color}
            style_of = vars(look) | {"linestyle": "none", "label": "_all_zero"} | hollow
            panel.plot(x[all_zero], np.full(all_zero.sum(), floor), **style_of)
    panel.axhline(100 * (1 - sparsity), color="0.45", linestyle=(0, (1, 2)), linewidth=1.2)
    panel.set_xlim(-0.5, max(len(order), 1) - 0.5)
    panel.grid(visible=False, axis="x")
    _name_layers(panel, order["size"].tolist())
    return handles


def _name_layers(panel: Axes, sizes: list[int]) -> None:
    many = len(sizes) > 2.2 * style.cell_inches(panel)[0]
    names = [f"{i}: {n:,}" if many else f"{i}\n{n:,}" for i, n in enumerate(sizes, 1)]
    panel.set_xticks(range(len(sizes)), names, rotation=90 if many else 0, fontsize=7)
