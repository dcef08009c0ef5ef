"""Style of all plots: colours, markers and lines of methods, panels, captions, files.

A plot is drawn for the screen, or for paper with the width of a column or of a page. A drawing
function does not know for which: `panels` chooses the size, and `applied` the size of letters.

Import path: robsparse.figures.plots.style
"""

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)

from robsparse.base.files import atomic
from robsparse.figures.data.reliability import FINE, LOOK, UNRELIABLE
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import Group, groups, methods, sparsities
from robsparse.figures.text.formats import percent
from robsparse.study.study import Study

# Colours of Okabe and Ito, which colour-blind readers can distinguish. Pale yellow is the last.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
# Eight colours, seven markers and five lines: the first 40 methods all look different.
MARKERS = ("s", "o", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ((0, (6, 2)), "-", (0, (4, 1.2)), (0, (3, 1, 1, 1)), (0, (1, 1)))

# These methods look the same in every study.
_FIRST = ("dense", "bcs", "lwm", "admm", "hydra")

WIDTHS = {"column": 3.25, "page": 6.75}  # inches; of one and of two columns of a paper
_PAPER: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 7),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 6.5),
    "lines.linewidth": 1.0,
    "lines.markersize": 4.0,
    "legend.handlelength": 2.8,
    "errorbar.capsize": 1.5,
}
_width: ContextVar[float | None] = ContextVar("width", default=None)  # None: for the screen
_LEAST = 0.45  # a panel may shrink to this share of its width before a row of panels is broken
_LOW = 1.7  # a panel of at most this height (inches) keeps its height when its width shrinks


class Plot(Figure):
    """A figure and its caption, which is written beside the picture and not into it."""

    caption: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """How one method is drawn."""

    label: str
    color: str
    marker: str
    linestyle: Any
    gid: str  # name of the method in an SVG file, by which the page shows and hides it

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`; markers have a white edge."""
        return vars(self) | {"markeredgecolor": "white", "markeredgewidth": 0.6}

    def points(self, grade: str) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` for markers alone: the filling shows the grade.

        Full: fine. Upper half white: look. White: unreliable.
        """
        edge = {"markeredgecolor": self.color, "markeredgewidth": 0.9, "linestyle": "none"}
        if grade == FINE:
            return self.line | {"linestyle": "none"}
        filling = {"fillstyle": "bottom", "markerfacecoloralt": "white"}
        return vars(self) | edge | (filling if grade == LOOK else {"markerfacecolor": "white"})


def looks(study: Study) -> dict[str, Look]:
    """The look of every method of a study, in the order of tables and legends."""
    others = [name for name in methods(study) if name not in _FIRST]
    position = {name: index for index, name in enumerate([*_FIRST, *others])}
    return {
        name: _look(study.label("method", name), position[name], name) for name in methods(study)
    }


def _look(label: str, index: int, name: str) -> Look:
    colour, marker, line = (choices[index % len(choices)] for choices in (COLOURS, MARKERS, LINES))
    return Look(label, colour, marker, line, f"method:{name}")


@contextmanager
def applied(width: float | None = None) -> Iterator[None]:
    """Use robsparse.mplstyle in a with block; restore the settings of the caller after it.

    Args:
        width: width of a plot for paper in inches; None: for the screen, as wide as it needs.
    """
    own = Path(__file__).with_name("robsparse.mplstyle")
    with matplotlib.style.context(["default", own, {} if width is None else _PAPER]):
        token = _width.set(width)
        try:
            yield
        finally:
            _width.reset(token)


def panels(
    rows: int,
    columns: int,
    *,
    width: float = 3.1,
    height: float = 2.9,
    unbroken: bool = False,
    scaled: bool = True,
    **shared: Any,
) -> tuple[Plot, list[list[Axes]]]:
    """Make a figure with panels, without the global state of pyplot.

    Args:
        rows: rows of panels.
        columns: columns of panels.
        width: width of a panel in inches. On paper it may be smaller.
        height: height of a panel in inches. On paper it may be smaller.
        unbroken: keep each row in one line. Otherwise, a row that is too wide for the paper
            continues in the next line.
        scaled: a panel that becomes narrower also becomes lower.
        shared: `sharex`, `sharey` and `width_ratios` of `Figure.subplots`.

    Returns:
        The figure and its panels (rows × columns).
    """
    paper, lines, each = _width.get(), 1, columns
    if paper is not None:
        if not unbroken:
            lines = math.ceil(columns / max(1, int(paper / (_LEAST * width))))
        each = math.ceil(columns / lines)
        height = min(height, max(_LOW, height * paper / each / width)) if scaled else height
    figure = Plot(figsize=(figure_inches(width * columns), height * rows * lines))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows * lines, each, squeeze=False, **shared)
    found = [
        [panel for line in axes[lines * i : lines * (i + 1)] for panel in line] for i in range(rows)
    ]
    for row in found:
        for panel in row[columns:]:
            panel.remove()
    return figure, [row[:columns] for row in found]


def figure_inches(needed: float) -> float:
    """Width of a figure whose panels need so many inches: on paper, that of the paper."""
    paper = _width.get()
    return max(6.2, needed) if paper is None else paper


def grid(material: Material, **options: Any) -> tuple[Plot, Iterator[tuple[Group, float, Axes]]]:
    """Make a row of panels for each group and a column for each sparsity; options: see `panels`."""
    study = material.study
    found, columns = groups(study), sparsities(study)
    figure, axes = panels(len(found), len(columns), **options)
    several = len(found) > 1

    def each() -> Iterator[tuple[Group, float, Axes]]:
        for group, row in zip(found, axes, strict=True):
            for sparsity, panel in zip(columns, row, strict=True):
                if sparsity not in sparsities(study, group):
                    panel.set_visible(False)
                    continue
                panel.set_title(f"{group}\n" * several + f"sparsity {percent(sparsity)}")
                yield group, sparsity, panel

    return figure, each()


def name_axes(figure: Figure, x: str, y: str) -> None:
    """Name x below the lowest panels, and y beside the leftmost ones.

    If all panels have the same axis, only these panels have numbers on it.
    """
    shown = [p for p in figure.axes if p.get_visible() and p.get_subplotspec() is not None]
    places = {panel: _place(panel) for panel in shown}
    lowest = {
        column: max(r for r, c in places.values() if c == column) for _, column in places.values()
    }
    leftmost = {row: min(c for r, c in places.values() if r == row) for row, _ in places.values()}
    width, height = cell_inches(shown[0])
    x, y = fill(x, width), fill(y, height)
    for panel, (row, column) in places.items():
        low, left = row == lowest[column], column == leftmost[row]
        panel.set_xlabel(x if low else "")
        panel.set_ylabel(y if left else "")
        if len(panel.get_shared_x_axes().get_siblings(panel)) > 1:
            panel.tick_params(labelbottom=low)
        if len(panel.get_shared_y_axes().get_siblings(panel)) > 1:
            panel.tick_params(labelleft=left)


def fill(text: str, inches: float) -> str:
    """Break the name of an axis of so many inches into lines."""
    letters = int(0.75 * inches * 72 / (0.6 * float(mpl.rcParams["axes.labelsize"])))
    return textwrap.fill(text, max(letters, 10))


def text_inches(text: str, size: float) -> float:
    """Width of a line of text in letters of so many points."""
    if not text.strip():
        return 0.0
    width = TextPath((0, 0), text, prop=FontProperties(size=size)).get_extents().width
    return float(width) / 72


def cell_inches(panel: Axes) -> tuple[float, float]:
    """Width and height of the cell of the grid in which a panel is, before the layout."""
    place, figure = panel.get_subplotspec(), panel.get_figure(root=True)
    assert place is not None
    assert figure is not None
    rows, columns = place.get_gridspec().get_geometry()
    width, height = figure.get_size_inches()
    return float(width) / columns, float(height) / rows


def _place(panel: Axes) -> tuple[int, int]:
    place = panel.get_subplotspec()
    assert place is not None
    return place.rowspan.start, place.colspan.start


def log_axis(panel: Axes, low: float, high: float, form: str) -> None:
    """Make y logarithmic from low to high. If the range is small, 2 and 5 have labels too."""
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    few = math.log10(high / low) < 2
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    panel.yaxis.set_major_formatter(StrMethodFormatter(form))
    panel.yaxis.set_minor_formatter(NullFormatter())


def counts_axis(panel: Axes) -> None:
    """Print the numbers of a linear x axis short ("40k"), and few of them, so that none overlap."""
    panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def grade_handles(grades: Iterable[str]) -> list[Line2D]:
    """Legend entries for the grades that occur in a plot, without "fine"."""
    look, found = Look("", "0.35", "o", "", ""), set(grades)
    shown = {LOOK: "look", UNRELIABLE: "unreliable"}
    return [
        Line2D([], [], **look.points(grade) | {"label": text, "gid": None})
        for grade, text in shown.items()
        if grade in found
    ]


def finish(figure: Plot, handles: Iterable[Artist], caption: Sequence[str]) -> Plot:
    """Add one legend above the panels, lay everything out, and keep the caption.

    Args:
        figure: the figure with its panels drawn.
        handles: legend entries.
        caption: paragraphs.
    """
    figure.caption = tuple(caption)
    entries = list(handles)
    if entries:
        width, height = figure.get_size_inches()
        lines, columns = _legend_shape(entries, width)
        points = float(mpl.rcParams["legend.fontsize"])
        figure.set_size_inches(width, height + (lines * 1.7 * points + 8) / 72)
        with mpl.rc_context({"legend.handlelength": _handle_length(entries)}):
            figure.legend(handles=entries, loc="outside upper center", ncols=columns)
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # files of one figure share its layout
    return figure


def _handle_length(entries: Sequence[Artist]) -> float:
    """Length of the line of a legend entry, in letters; entries without lines need less."""
    bare = all(isinstance(e, Line2D) and e.get_linestyle() == "None" for e in entries)
    return 1.2 if bare else float(mpl.rcParams["legend.handlelength"])


def _legend_shape(entries: Sequence[Artist], width: float) -> tuple[int, int]:
    """Lines and columns of a legend that is at most so many inches wide."""
    size = float(mpl.rcParams["legend.fontsize"])
    letters = max(text_inches(str(entry.get_label()), size) for entry in entries)
    inches = letters + size * (_handle_length(entries) + 2.8) / 72  # with gaps
    lines = math.ceil(len(entries) / max(1, int(width / inches)))
    return lines, math.ceil(len(entries) / lines)


def no_data(panel: Axes, message: str = "no data") -> None:
    """Write a message into a panel without data, and hide its axes."""
    bare(panel)
    panel.text(0.5, 0.5, message, transform=panel.transAxes, ha="center", va="center")


def bare(panel: Axes) -> None:
    """Hide the axes but keep the space for the title, which `set_axis_off` removes."""
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    for spine in panel.spines.values():
        spine.set_visible(False)


def wrap(text: str, letters: int) -> list[str]:
    """Split a text into lines with at most so many letters."""
    return textwrap.wrap(text, letters)


def empty(message: str, caption: Sequence[str]) -> Plot:
    """Make a figure with a message, for a plot without data."""
    figure, [[panel]] = panels(1, 1, height=1.0)
    no_data(panel, textwrap.fill(message, 40))
    return finish(figure, [], caption)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or PDF. The bytes are always the same; no partial file is left."""
    suffix = path.suffix.removeprefix(".")
    metadata = {"pdf": {"CreationDate": None}, "png": {"Software": None}}[suffix]
    with atomic(path) as temporary:
        figure.savefig(temporary, format=suffix, metadata=metadata)


def svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG with text as text, the same at each call.

    Args:
        figure: the figure.
        name: a name that makes the identifiers in the file different from those of other files.
    """
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
