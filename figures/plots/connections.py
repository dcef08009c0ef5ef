"""Plots of connections: density of layers during training, survival, magnitudes, mask overlap.

Import path: robsparse.figures.plots.connections
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, StrMethodFormatter

from robsparse.figures.data.statistics import survival_curve
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import GROUP, Group, groups, methods, sparsities
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import plot_caption
from robsparse.figures.text.formats import percent

_LEAST_CELL = 0.27  # inches; a smaller cell has no room for its numbers
_CROWDED = 0.17  # inches; names of smaller cells are written upright
_SCALE = 0.6  # inches beside a panel and its names, for the scale of colours
_MOST_LAYERS = 8  # entries in a legend of layers
_NO_LOG = "No method of this study rewires: a fixed mask prunes and regrows nothing."


def density_over_training(material: Material) -> Plot:
    """Density of every layer from the first to the last step, for each method that rewires."""
    general = plot_caption(material, attacked=False, selected=False)
    steps = material.tidy.steps
    if steps.empty:
        return style.empty(_NO_LOG, [general])
    caption = [
        "One line for each layer, from the first (dark) to the last (light), mean over seeds. Dot: "
        f"initial network; ring: mean epoch of the selected weights ({material.primary}); square: "
        "last step. Dashed: target density of the whole network.",
        general,
    ]
    shown = [
        (group, method, sparsity, rows)
        for group in groups(material.study)
        for method in methods(material.study, group)
        for sparsity in sparsities(material.study, group)
        if len(rows := _select(group.select(steps), method, sparsity))
    ]
    columns = min(4, len(shown))
    figure, axes = style.panels(-(-len(shown) // columns), columns, sharey=True)
    panels = [panel for row in axes for panel in row]
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, (group, method, sparsity, rows) in zip(panels, shown, strict=False):
        _density_lines(panel, rows, _layer_sizes(material, group), _selected_at(material, rows))
        panel.axhline(100 * (1 - sparsity), color="0.45", linestyle="--", linewidth=1.0)
        label = material.study.label("method", method)
        several = f"{group}\n" * (len(groups(material.study)) > 1)
        panel.set_title(f"{several}{label}, {percent(sparsity)}")
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    style.name_axes(figure, "share of training steps", "density of the layer (%)")
    sizes = pd.concat([_layer_sizes(material, group) for group in groups(material.study)])
    return style.finish(figure, _layer_handles(sizes), caption)


def _layer_handles(sizes: pd.Series) -> list[Line2D]:
    """Legend of the layers; of many layers, the first, the last and some between them.

    Args:
        sizes: prunable weights by layer, in forward order, for all groups one after the other.
    """
    sizes = sizes[~sizes.index.duplicated()]
    kept = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), _MOST_LAYERS)).astype(int))
    shades = _shades(len(sizes))
    return [
        Line2D([], [], color=shades[i], label=f"layer {i + 1}: {sizes.iloc[i]:,} weights")
        for i in kept
    ]


def _shades(count: int) -> np.ndarray:
    return colormaps["cividis"](np.linspace(0, 0.9, max(count, 2)))


def _select(table: pd.DataFrame, method: str, sparsity: float) -> pd.DataFrame:
    return table[(table.method == method) & (table.sparsity == sparsity)]


def _layer_sizes(material: Material, group: Group) -> pd.Series:
    layers = group.select(material.tidy.layers).drop_duplicates("layer")
    return layers.set_index("layer")["size"]


def _selected_at(material: Material, rows: pd.DataFrame) -> float:
    """Epoch of the selected weights divided by all epochs, mean over seeds."""
    keys = ["dataset", "arch", "objective", "method", "sparsity"]
    results = material.tidy.results
    same = np.logical_and.reduce([results[key] == rows.iloc[0][key] for key in keys])
    selected = results[same & (results.selection == material.primary)]
    return float((selected.selected_epoch / selected.epochs).mean())


def _density_lines(panel: Axes, rows: pd.DataFrame, sizes: pd.Series, selected: float) -> None:
    names = [name for name in sizes.index if name in set(rows.layer)]
    shades = _shades(len(sizes))[[sizes.index.get_loc(name) for name in names]]
    mean = rows.groupby(["layer", "step"], observed=True).active.mean()
    for name, shade in zip(names, shades, strict=False):
        density = 100 * mean.loc[name] / sizes[name]
        density = density.where(density > 0)
        done = density.index.to_numpy() / density.index.max()
        panel.plot(done, density, color=shade, linewidth=1.3)
        for at, marker in ((0.0, "o"), (selected, "$\\circ$"), (1.0, "s")):
            if np.isfinite(at):
                value = np.interp(at, done, density)
                panel.plot(at, value, marker=marker, color=shade, markersize=6, linestyle="none")


def survival(material: Material) -> Plot:
    """Share of regrown connections that are still active at each age in steps."""
    general = plot_caption(material, attacked=False, selected=False)
    table = material.tidy.lifetimes
    if table.empty:
        return style.empty(_NO_LOG, [general])
    figure, panels = style.grid(material, sharey=True)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        for name, look in style.looks(material.study).items():
            own = _select(group.select(table), name, sparsity)
            if own.empty:
                continue
            ages, active = survival_curve(own.age, own.pruned, own.active)
            marks = np.unique(np.geomspace(1, len(ages), 8).astype(int) - 1)
            options = look.line | {"markevery": marks.tolist()}
            handles[name] = panel.plot(ages, 100 * active, drawstyle="steps-post", **options)[0]
        panel.set_xscale("log")
        panel.set_ylim(0, 100)
        if not panel.lines:
            style.no_data(panel)
    style.name_axes(figure, "age (training steps)", "regrown connections still active (%)")
    caption = [
        "Kaplan-Meier estimate over all regrown connections of all seeds. A connection that is "
        "active at the end of training counts as censored at its age. Connections of the initial "
        "network are left out.",
        general,
    ]
    return style.finish(figure, handles.values(), caption)


def weight_magnitudes(material: Material) -> Plot:
    """Histogram of |w| of the nonzero weights of the selected networks."""
    general = plot_caption(material, attacked=False, selected=True)
    table = material.tidy.weights
    table = table[table.selection == material.primary]
    if table.empty:
        return style.empty("No weights have been collected.", [general])
    figure, panels = style.grid(material, sharex=True)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        for name, look in style.looks(material.study).items():
            at = material.study.sparsity_of(name, sparsity)
            own = _select(group.select(table), name, at)
            if own.empty:
                continue
            # The collected bins are 0.1 decades wide; three bins are added up.
            decade = np.floor(10 * np.log10(own.high) / 3 - 0.5) * 0.3
            share = own["count"].groupby(decade).sum() / own["count"].sum()
            places = np.arange(decade.min() - 0.3, decade.max() + 0.6, 0.3)
            heights = 100 * np.interp(places, share.index, share, left=0, right=0)
            found = np.isclose(places[:, None], share.index.to_numpy()[None]).any(axis=1)
            line = look.line | {"markevery": 6, "markersize": 4}
            heights = np.where(found, heights, 0)
            handles[name] = panel.step(10.0**places, heights, where="mid", **line)[0]
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=5))
        panel.set_ylim(bottom=0)
        if not panel.lines:
            style.no_data(panel)
    style.name_axes(figure, "|w| of nonzero weights", "share of nonzero weights (%)")
    caption = [
        "Shares in bins of 0.3 decades, all layers and seeds together. Weights near 1e-12 are "
        "regrown connections that training has not changed.",
        general,
    ]
    return style.finish(figure, handles.values(), caption)


def mask_overlap(material: Material) -> Plot:
    """Jaccard index of the masks of two methods, mean over pairs of seeds."""
    general = plot_caption(material, attacked=False, selected=True)
    table = material.tidy.overlap
    same = (table.selection_a == material.primary) & (table.selection_b == material.primary)
    table = table[same]
    if table.empty:
        return style.empty("The study has no two sparse networks to compare.", [general])
    names = [n for n in methods(material.study) if not material.study.is_dense(n)]
    side = max(2.6, 0.45 * len(names) + 1.2)
    figure, panels = style.grid(material, width=side, height=side)
    pairs = table.groupby([*GROUP, "sparsity", "method_a", "method_b"]).jaccard
    top, picture = 100 * float(pairs.mean().max()), None
    for group, sparsity, panel in panels:
        if sparsity:
            own = group.select(table)
            own = own[own.sparsity == sparsity]
            picture = _overlap_panel(panel, material, group, own, max(top, 1.0))
        else:
            panel.set_visible(False)
    caption = [
        "Jaccard index of masks in %: weights that are nonzero in both networks over weights that "
        "are nonzero in at least one; mean over all pairs of different networks. On the diagonal: "
        "pairs of seeds of one method. In brackets: the index to expect of random masks with as "
        "many nonzero weights in each layer.",
        general,
    ]
    if picture is not None:
        shown = [panel for panel in figure.axes if panel.get_visible()]
        figure.colorbar(picture, ax=shown, shrink=0.7, label="Jaccard index (%)")
    return style.finish(figure, [], caption)


def _overlap_panel(
    panel: Axes,
    material: Material,
    group: Group,
    table: pd.DataFrame,
    top: float,
) -> AxesImage:
    names = [n for n in methods(material.study, group) if not material.study.is_dense(n)]
    values = _overlaps(table, names)
    picture = panel.imshow(values[0], cmap="cividis", vmin=0, vmax=top)
    labels = [material.study.label("method", name) for name in names]
    beside = max(style.text_inches(label, 7.0) for label in labels) + _SCALE
    cell = (style.cell_inches(panel)[0] - beside) / len(names)
    if cell > _LEAST_CELL:
        for i, j in np.argwhere(np.isfinite(values[0])):
            colour = "white" if values[0, i, j] < 0.55 * top else "black"
            text = f"{values[0, i, j]:.0f}\n({values[1, i, j]:.0f})"
            panel.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
    turned: dict[str, Any] = {"rotation": 45, "va": "top"}
    if cell < _CROWDED:
        turned = {"rotation": 90, "va": "center"}
    panel.set_xticks(range(len(names)), labels, ha="right", rotation_mode="anchor", **turned)
    panel.set_yticks(range(len(names)), labels)
    panel.tick_params(labelsize=min(7.0, 0.7 * 72 * cell))
    panel.grid(visible=False)
    return picture


def _overlaps(table: pd.DataFrame, names: list[str]) -> np.ndarray:
    """Mean index and expected index in % of each two methods (2×M×M); nan without a pair."""
    values = np.full((2, len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            pair = table[
                ((table.method_a == a) & (table.method_b == b))
                | ((table.method_a == b) & (table.method_b == a))
            ]
            if len(pair):
                values[:, i, j] = 100 * pair.jaccard.mean(), 100 * pair.expected_jaccard.mean()
    return values
