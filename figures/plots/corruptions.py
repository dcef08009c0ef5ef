"""Plot of the accuracy on common corruptions.

Import path: robsparse.figures.plots.corruptions
"""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from robsparse.figures.data.corrupted import MEAN, accuracies
from robsparse.figures.data.summary import Material
from robsparse.figures.plots import style
from robsparse.figures.plots.finals import dodge
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import interval_note, plot_caption
from robsparse.figures.text.formats import join


def corruptions(material: Material) -> Plot:
    """Accuracy on each common corruption, mean over severities, with intervals."""
    general = plot_caption(material, attacked=True, selected=True)
    measured = material.tidy.corruptions
    if measured.empty:
        return style.empty("No accuracy on common corruptions was measured.", [general])
    caption = [
        f"Accuracy on images with common corruptions ({join(measured.source)}), mean over the "
        "severities 1 to 5 and over seeds; first the mean over all corruptions. A corruption is no "
        f"attack. Bars: {interval_note(material)}. The dense network is the same in every panel.",
        general,
    ]
    figure, panels = style.grid(material, width=6.4, height=3.0)
    handles: dict[str, Line2D] = {}
    for group, sparsity, panel in panels:
        table = accuracies(material, group)
        dense = table.method.map(material.study.is_dense)
        handles |= _panel(panel, material, table[dense | (table.sparsity == sparsity)])
    style.name_axes(figure, "", "accuracy (%)")
    return style.finish(figure, handles.values(), caption)


def _panel(panel: Axes, material: Material, table: pd.DataFrame) -> dict[str, Line2D]:
    """Draw the methods side by side at each corruption. Return the legend entries."""
    names = table.corruption.unique().tolist()
    looks = {n: k for n, k in style.looks(material.study).items() if n in set(table.method)}
    handles: dict[str, Line2D] = {}
    for index, (method, look) in enumerate(looks.items()):
        own = table[table.method == method].set_index("corruption").reindex(names)
        x = [place + dodge(index, len(looks)) for place in range(len(names))]
        bar: dict[str, Any] = {"color": look.color, "linewidth": 1.0, "gid": look.gid}
        panel.vlines(x, 100 * own.low, 100 * own.high, **bar)
        shown = look.line | {"linestyle": "none"}
        handles[method] = panel.plot(x, 100 * own.accuracy, **shown)[0]
    labels = [name.replace("_", " ") for name in names]
    panel.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor")
    panel.set_xlim(-0.5, max(len(names), 1) - 0.5)
    panel.set_ylim(0, 100)
    panel.grid(visible=False, axis="x")
    if MEAN in names:
        panel.axvline(0.5, color="0.7", linewidth=0.8)
    else:
        style.no_data(panel)
    return handles
