"""Plot of robust accuracy against the cost of training and its peak of active weights.

Import path: robsparse.figures.plots.costs
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import groups, sparsities
from robsparse.figures.plots import style
from robsparse.figures.text.captions import interval_note, plot_caption, unreliable_note
from robsparse.figures.text.formats import percent

_APART = 6.0  # points between markers that would coincide
_AXES = {
    "passes": "training cost: passes over a batch",
    "peak_active_weights": "peak active weights in training",
}


def cost(material: Material) -> Figure:
    """Plot accuracy under the strongest attack against passes and against peak active weights."""
    study = material.study
    label = study.label("attack", STRONGEST)
    caption = [
        f"{label} accuracy, mean over seeds; {interval_note(material)}. Passes: forward and "
        "backward passes over batches, including crafting and pretraining. Peak active weights: "
        "the largest number of active weights during training. Markers of equal cost are "
        "drawn side by side; the cost table has the numbers. The dense network is the same in "
        "every column.",
        *unreliable_note(material),
        plot_caption(material, attacked=True, selected=True),
    ]
    column = f"{STRONGEST}_accuracy"
    rows = material.summary[material.summary.selection == material.primary]
    if column not in rows or rows[[column, "forward_passes"]].isna().any(axis=1).all():
        return style.empty(f"No network has a {label} accuracy and a cost.", caption[-1:])
    rows = rows.assign(passes=rows.forward_passes + rows.backward_passes)
    found, columns = groups(study), sparsities(study)
    figure, axes = style.panels(2 * len(found), len(columns), sharey="row", sharex="row")
    handles: dict[str, Line2D] = {}
    for index, panels in enumerate(axes):
        group, x = found[index // 2], list(_AXES)[index % 2]
        for sparsity, panel in zip(columns, panels, strict=True):
            if sparsity not in sparsities(study, group):
                panel.set_visible(False)
                continue
            own = group.select(rows)
            own = own[own.sparsity.eq(sparsity) | own.method.map(study.is_dense)]
            handles |= _panel(figure, panel, material, own, x)
            panel.set_title(f"{group}\n" * (len(found) > 1) + f"sparsity {percent(sparsity)}")
            panel.set_xlabel(_AXES[x])
        _limits(panels[0], group.select(rows), x)
        panels[0].set_ylabel(f"{label} accuracy (%)")
    return style.finish(figure, handles.values(), caption)


def _panel(
    figure: Figure, panel: Axes, material: Material, rows: pd.DataFrame, x: str
) -> dict[str, Line2D]:
    looks, handles = style.looks(material.study), {}
    level = 2 if x == "passes" else 3  # digits that two costs must share to be drawn as equal
    places = {name: f"{value:.{level}g}" for name, value in zip(rows.method, rows[x], strict=True)}
    for name, look in looks.items():
        own = rows[(rows.method == name) & rows[x].notna()]
        same = [other for other in looks if places.get(other) == places.get(name)]
        points = _APART * (same.index(name) - (len(same) - 1) / 2)
        moved = panel.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
        mean, low, high = (
            100 * own[f"{STRONGEST}_{column}"] for column in ("accuracy", "low", "high")
        )
        panel.vlines(own[x], low, high, color=look.color, linewidth=0.9, transform=moved)
        drawn = look.line | {"linestyle": "none"}
        handles[name] = panel.plot(own[x], mean, **drawn, transform=moved)[0]
        for place, level, reasons in zip(own[x], mean, own.potentially_unreliable, strict=True):
            style.mark_unreliable(panel, place, level, reasons, xycoords=moved)
    return handles


def _limits(panel: Axes, rows: pd.DataFrame, x: str) -> None:
    """Set the limits: automatic limits ignore markers that are shifted by points."""
    known, heights = rows[x].dropna(), 100 * rows[f"{STRONGEST}_high"].dropna()
    if x == "passes":
        panel.set_xlim(0, 1.3 * known.max())
    else:
        panel.set_xscale("log")
        panel.set_xlim(known.min() / 2.5, known.max() * 4)
    panel.set_ylim(0, min(100, 1.08 * heights.max()) if len(heights) else 100)
