"""Plots of training: robust accuracy, active weights, pruned and regrown connections.

Import path: robsparse.figures.plots.curves
"""

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import SEEDED
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import plot_caption

_WIDEST = 6.5  # points by which the widest line is wider than the thinnest
_WINDOWS = 60  # a curve of steps is smoothed to about this many independent points
_REWIRED = ["regrown", "pruned"]
_FEW = 3  # with at least so many methods, the legend is shortened


def training_curves(material: Material) -> Plot:
    """Robust accuracy on held-out images of each epoch, for each method and sparsity."""
    caption = [
        "Accuracy on held-out training images under the PGD attack of the validation, after each "
        "epoch, mean over seeds; band: smallest and largest value of the seeds. Pretraining is "
        "included. A marker shows the start of a stage. These images choose the epoch; they are "
        "not the test images.",
        plot_caption(material, attacked=False, selected=False),
    ]
    curves = material.tidy.curves
    if "val_robust" not in curves or curves.val_robust.isna().all():
        return style.empty("No training curves have been collected.", caption[1:])
    figure, panels = style.grid(material, sharey=True, sharex=True)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        found = _validation_panel(panel, material, group.select(curves), sparsity)
        handles |= found
        if not found:
            style.no_data(panel)
        panel.set_ylim(0, 100)
    style.name_axes(figure, "epoch", "robust accuracy (%), held-out images")
    return style.finish(figure, handles.values(), caption)


def _validation_panel(
    panel: Axes, material: Material, curves: pd.DataFrame, sparsity: float
) -> dict[str, Line2D]:
    handles = {}
    for name, look in style.looks(material.study).items():
        own = _curves_of(material, curves, name, sparsity).dropna(subset="val_robust")
        if own.empty:
            continue
        found = (100 * own.groupby("epoch").val_robust.agg(["mean", "min", "max"])).reset_index()
        stages = own.groupby("epoch").stage.first()
        starts = np.flatnonzero(stages != stages.shift()).tolist()
        fill: dict[str, Any] = {"color": look.color, "alpha": 0.13, "linewidth": 0}
        panel.fill_between(found.epoch, found["min"], found["max"], **fill, gid=look.gid)
        handles[name] = panel.plot(found.epoch, found["mean"], **look.line, markevery=starts)[0]
    return handles


def _curves_of(
    material: Material, curves: pd.DataFrame, method: str, sparsity: float
) -> pd.DataFrame:
    at = material.study.sparsity_of(method, sparsity)
    return curves[(curves.method == method) & (curves.sparsity == at)]


def active_weights(material: Material) -> Plot:
    """Active weights of each epoch, for each method and sparsity."""
    caption = [
        "Active weights: prunable weights that are not zero, and those that a method still scores "
        "or regularises; mean over seeds, including pretraining. A marker shows the start of a "
        "stage. Of lines with equal numbers, the later one in the legend is thinner and lies on "
        "top.",
        plot_caption(material, attacked=False, selected=False),
    ]
    curves = material.tidy.curves
    if curves.empty:
        return style.empty("No training curves have been collected.", caption[1:])
    figure, panels = style.grid(material, sharey=True)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        found = _active_panel(panel, material, group.select(curves), sparsity)
        handles |= found
        active = curves.active_weights
        style.log_axis(panel, active.min() / 1.7, active.max() * 1.7, "{x:,.0f}")
        if not found:
            style.no_data(panel)
    style.name_axes(figure, "epoch", "active weights")
    return style.finish(figure, handles.values(), caption)


def _active_panel(
    panel: Axes, material: Material, curves: pd.DataFrame, sparsity: float
) -> dict[str, Line2D]:
    looks = style.looks(material.study)
    thin: float = mpl.rcParams["lines.linewidth"]
    step = min(1.6, _WIDEST / max(1, len(looks) - 1))
    handles = {}
    for above, (name, look) in enumerate(reversed(looks.items())):
        own = _curves_of(material, curves, name, sparsity)
        epochs, active, starts = active_by_epoch(own)
        if not len(epochs):
            continue
        options = look.line | {"linewidth": thin + above * step, "zorder": 3 - 0.01 * above}
        options |= {"linestyle": "-"}
        line = panel.plot(epochs, active, **options, drawstyle="steps-pre", markevery=starts)
        handles[name] = line[0]
    return {name: handles[name] for name in looks if name in handles}


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


def rewiring(material: Material) -> Plot:
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
        if not found:
            style.no_data(panel)
    style.name_axes(figure, "training step", "connections per step")
    caption = [
        f"Mean over seeds, moving average of {window * every} steps. Thin line: regrown; wide "
        "line: pruned. Renewed: number of regrown connections of the whole training divided by "
        "the nonzero weights of the network. "
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
        wide: dict[str, Any] = {
            "color": look.color,
            "linewidth": 4.0,
            "alpha": 0.35,
            "gid": look.gid,
        }
        thin: dict[str, Any] = vars(look) | {"linewidth": 1.1, "marker": ""}
        lines = {
            "pruned": panel.plot(smooth.pruned, **wide, label=f"{look.label}: pruned"),
            "regrown": panel.plot(
                smooth.regrown, **thin | {"label": look.label + ": regrown" * (len(shown) > 1)}
            ),
        }
        handles |= {f"{name} {kind}": line for kind, [line] in lines.items() if kind in shown}
        weights = networks.loc[networks.method == name, "nonzero"].mean()
        times = every * mean.regrown.sum() / weights
        if np.isfinite(times):
            total = f"{times:.2g} times" if times >= 1 else f"{100 * times:.2g} %"
            totals.append(f"{look.label} renewed {total}")
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    return handles, totals
