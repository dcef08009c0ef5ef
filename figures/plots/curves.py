"""Plots of training: active weights, and connections that are pruned and regrown.

Import path: robsparse.figures.plots.curves
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import SEEDED
from robsparse.figures.plots import style
from robsparse.figures.text.captions import plot_caption

_APART = 1.5  # points between lines with equal values
_WINDOWS = 60  # a curve of steps is smoothed to about this many independent points
_REWIRED = ["regrown", "pruned"]
_FEW = 3  # with at least so many methods, the legend is shortened


def active_weights(material: Material) -> Figure:
    """Active weights of each epoch, for each method and sparsity."""
    caption = [
        "Active weights: prunable weights that are not zero, and those that a method still scores "
        "or regularises; mean over seeds, including pretraining. A marker shows the start of a "
        "stage. Lines are shifted by up to 3 points so that equal lines are visible; the main "
        "table has the numbers.",
        plot_caption(material, attacked=False, selected=False),
    ]
    curves = material.tidy.curves
    if curves.empty:
        return style.empty("No training curves have been collected.", caption[1:])
    figure, panels = style.grid(material, sharey=True)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        handles |= _active_panel(figure, panel, material, group.select(curves), sparsity)
        if style.is_leftmost(panel):
            panel.set_ylabel("active weights")
        panel.set_xlabel("epoch")
        # Automatic limits ignore lines that are shifted by points.
        last, active = curves.epoch.max(), curves.active_weights
        panel.set_xlim(-0.03 * last, 1.03 * last)
        style.log_axis(panel, active.min() / 1.7, active.max() * 1.7, "{x:,.0f}")
    return style.finish(figure, handles.values(), caption)


def _active_panel(
    figure: Figure, panel: Axes, material: Material, curves: pd.DataFrame, sparsity: float
) -> dict[str, Line2D]:
    looks = style.looks(material.study)
    handles = {}
    for index, (name, look) in enumerate(looks.items()):
        at = material.study.sparsity_of(name, sparsity)
        own = curves[(curves.method == name) & (curves.sparsity == at)]
        epochs, active, starts = active_by_epoch(own)
        points = _APART * ((len(looks) - 1) / 2 - index)
        shift = ScaledTranslation(0, points / 72, figure.dpi_scale_trans)
        handles[name] = panel.plot(
            epochs,
            active,
            **look.line,
            drawstyle="steps-pre",
            markevery=starts,
            transform=panel.transData + shift,
        )[0]
    return handles


def active_by_epoch(curves: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Mean over seeds of the active weights of one method at one sparsity.

    Returns:
        Epochs (E+1, from 0), active weights up to each of them (E+1), and the positions at which a
        stage starts.
    """
    if curves.empty:
        return np.zeros(0), np.zeros(0), []
    mean = curves.groupby("epoch").agg(active=("active_weights", "mean"), stage=("stage", "first"))
    starts = np.flatnonzero(mean.stage != mean.stage.shift())
    active = mean.active.to_numpy(dtype=float)
    return np.r_[0, mean.index.to_numpy()], np.r_[active[:1], active], starts.tolist()


def rewiring(material: Material) -> Figure:
    """Connections regrown and pruned at each step, mean over seeds, smoothed."""
    steps = material.tidy.steps
    general = plot_caption(material, attacked=False, selected=False)
    if steps.empty:
        return style.empty(
            "No method of this study rewires: a fixed mask prunes and regrows nothing.",
            [general],
        )
    # All layers together; step 0 is the initial network.
    steps = steps[steps.step > 0].groupby([*SEEDED, "step"], as_index=False)[_REWIRED].sum()
    every = steps.step.min()
    steps[_REWIRED] /= every
    window = smoothing_window(steps)
    figure, panels = style.grid(material)
    handles: dict[str, Line2D] = {}
    totals: list[str] = []
    for group, sparsity, panel in panels:
        own = group.select(steps)
        own = own[own.sparsity == sparsity]
        networks = group.select(material.summary)
        networks = networks[networks.sparsity == sparsity]
        networks = networks[networks.selection == material.primary]
        found, renewed = _rewiring_panel(panel, material, own, networks, window=window, every=every)
        handles |= found
        totals.append(f"{panel.get_title()}: {', '.join(renewed)}.")
        if len(renewed) < _FEW:
            panel.set_title("\n".join([panel.get_title(), *renewed]))
        panel.set_xlabel("training step")
        if style.is_leftmost(panel):
            panel.set_ylabel(f"connections per step\n(moving average of {window * every} steps)")
    caption = [
        "Mean over seeds. Thin line: regrown; wide line: pruned. Renewed: number of regrown "
        "connections of the whole training divided by the nonzero weights of the network. "
        f"{' '.join(totals)}",
        general,
    ]
    return style.finish(figure, handles.values(), caption)


def smoothing_window(steps: pd.DataFrame) -> int:
    """Width of the moving average, in steps; odd, so that it is centred."""
    return 2 * round(steps.step.nunique() / _WINDOWS / 2) + 1


def _rewiring_panel(
    panel: Axes,
    material: Material,
    steps: pd.DataFrame,
    networks: pd.DataFrame,
    *,
    window: int,
    every: int,
) -> tuple[dict[str, Line2D], list[str]]:
    """Draw one panel. Return its lines, and for each method the text "NAME renewed SHARE"."""
    handles: dict[str, Line2D] = {}
    totals = []
    for name, look in style.looks(material.study).items():
        own = steps[steps.method == name]
        if own.empty:
            continue
        mean = own.groupby("step")[_REWIRED].mean()
        smooth = mean.rolling(window, center=True, min_periods=1).mean()
        shown = ["regrown"] if steps.method.nunique() >= _FEW else _REWIRED
        # The two lines are equal if the number of active connections is constant.
        wide: dict[str, Any] = {"color": look.color, "linewidth": 4.0, "alpha": 0.35}
        thin: dict[str, Any] = {"color": look.color, "linewidth": 1.1, "linestyle": look.linestyle}
        lines = {
            "pruned": panel.plot(smooth.pruned, **wide, label=f"{look.label}: pruned"),
            "regrown": panel.plot(
                smooth.regrown, **thin, label=look.label + ": regrown" * (len(shown) > 1)
            ),
        }
        handles |= {f"{name} {kind}": line for kind, [line] in lines.items() if kind in shown}
        weights = networks.loc[networks.method == name, "nonzero"].mean()
        times = every * mean.regrown.sum() / weights
        if np.isfinite(times):
            total = f"{times:.2g} times" if times >= 1 else f"{100 * times:.2g} %"
            totals.append(f"{look.label} renewed {total}")
    if not handles:
        panel.text(0.5, 0.5, "no data", transform=panel.transAxes, ha="center", va="center")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    return handles, totals
