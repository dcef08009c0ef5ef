"""Style of all plots: colours, markers and lines of methods, panels, captions, files.

Import path: robsparse.figures.plots.style
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from robsparse.base.files import atomic
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import Group, groups, methods, sparsities
from robsparse.figures.text.formats import UNRELIABLE, percent
from robsparse.study.study import Study

# Colours of Okabe and Ito, which colour-blind readers can distinguish. Pale yellow is the last.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
# Eight colours, seven markers and five lines: the first 40 methods all look different.
MARKERS = ("s", "o", "^", "D", "v", "P", "X")
LINES: tuple[Any, ...] = ((0, (6, 2)), "-", (0, (4, 1.2)), (0, (3, 1, 1, 1)), (0, (1, 1)))

# These methods look the same in every study.
_FIRST = ("dense", "bcs", "lwm", "admm", "hydra")

_CAPTION_POINTS = 7.0
_POINTS_PER_INCH = 72


@dataclass(frozen=True)
class Look:
    """How one method is drawn."""

    label: str
    color: str
    marker: str
    linestyle: Any

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`; markers have a white edge."""
        return vars(self) | {"markeredgecolor": "white", "markeredgewidth": 0.6}


def looks(study: Study) -> dict[str, Look]:
    """The look of every method of a study, in the order of tables and legends."""
    others = [name for name in methods(study) if name not in _FIRST]
    position = {name: index for index, name in enumerate([*_FIRST, *others])}
    return {name: _look(study.label("method", name), position[name]) for name in methods(study)}


def _look(label: str, index: int) -> Look:
    colour, marker, line = (choices[index % len(choices)] for choices in (COLOURS, MARKERS, LINES))
    return Look(label, colour, marker, line)


@contextmanager
def applied() -> Iterator[None]:
    """Use robsparse.mplstyle in a with block; restore the settings of the caller after it."""
    with matplotlib.style.context(["default", Path(__file__).with_name("robsparse.mplstyle")]):
        yield


def panels(
    rows: int, columns: int, *, width: float = 3.1, height: float = 2.9, **shared: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with panels, without the global state of pyplot.

    Args:
        rows: rows of panels.
        columns: columns of panels.
        width: width of a panel in inches.
        height: height of a panel in inches.
        shared: keyword arguments of `Figure.subplots`.
    """
    figure = Figure(figsize=(max(6.2, width * columns), height * rows + 1.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, [list(row) for row in axes]


def grid(material: Material, **options: Any) -> tuple[Figure, Iterator[tuple[Group, float, Axes]]]:
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


def is_leftmost(panel: Axes) -> bool:
    """Whether a panel is in the first column of its figure, where axes have their labels."""
    place = panel.get_subplotspec()
    return place is not None and place.is_first_col()


def is_lowest(panel: Axes) -> bool:
    """Whether a panel is in the last row of its figure."""
    place = panel.get_subplotspec()
    return place is not None and place.is_last_row()


def log_axis(panel: Axes, low: float, high: float, form: str) -> None:
    """Make y logarithmic from low to high. If the range is small, 2 and 5 have labels too."""
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    few = math.log10(high / low) < 2
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    panel.yaxis.set_major_formatter(StrMethodFormatter(form))
    panel.yaxis.set_minor_formatter(NullFormatter())


def mark_unreliable(panel: Axes, x: float, y: float, reasons: str, **where: Any) -> None:
    """Draw a dagger at a number if `reasons` (why it is potentially unreliable) is not empty."""
    if reasons and not math.isnan(y):
        offset = {"xytext": (4, 3), "textcoords": "offset points"}
        panel.annotate(UNRELIABLE, (x, y), **offset | where, fontsize=8, zorder=6)


def finish(figure: Figure, handles: Iterable[Artist], caption: Sequence[str]) -> Figure:
    """Add one legend above the panels and the caption below them, and lay everything out.

    Args:
        figure: the figure with its panels drawn.
        handles: legend entries.
        caption: paragraphs; each is wrapped to the width of the figure.
    """
    width, height = figure.get_size_inches()
    # The mean width of a letter is about 0.57 times the font size.
    letters = int((width - 0.3) * _POINTS_PER_INCH / (0.57 * _CAPTION_POINTS))
    lines = [line for part in caption for line in textwrap.wrap(part, letters)]
    inches = (len(lines) * 1.35 * _CAPTION_POINTS + 8) / _POINTS_PER_INCH
    height += inches
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, inches / height, 1, 1 - inches / height))
    figure.text(
        0.15 / width,
        4 / _POINTS_PER_INCH / height,
        "\n".join(lines),
        fontsize=_CAPTION_POINTS,
        linespacing=1.3,
        va="bottom",
        color="0.25",
    )
    entries = list(handles)
    if entries:
        # Width of an entry in inches: its line and its letters.
        longest = 0.55 + 0.075 * max(len(str(entry.get_label())) for entry in entries)
        rows = math.ceil(len(entries) / max(1, int(width / max(1.4, longest))))
        columns = math.ceil(len(entries) / rows)
        figure.legend(handles=entries, loc="outside upper center", ncols=columns)
    return figure


def bare(panel: Axes) -> None:
    """Hide the axes but keep the space for the title, which `set_axis_off` removes."""
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    for spine in panel.spines.values():
        spine.set_visible(False)


def wrap(text: str, letters: int) -> list[str]:
    """Split a text into lines with at most so many letters."""
    return textwrap.wrap(text, letters)


def empty(message: str, caption: Sequence[str]) -> Figure:
    """Make a figure with a message, for a plot without data."""
    figure, [[panel]] = panels(1, 1, height=1.4)
    panel.set_axis_off()
    panel.text(0.5, 0.5, textwrap.fill(message, 70), ha="center", va="center", fontsize=11)
    return finish(figure, [], caption)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or PDF. The bytes are always the same; no partial file is left."""
    suffix = path.suffix.removeprefix(".")
    metadata = {"pdf": {"CreationDate": None}, "png": {"Software": None}}[suffix]
    with atomic(path) as temporary:
        figure.savefig(temporary, format=suffix, metadata=metadata)
