"""Draws speed against sparsity from the rows of `robsparse bench sparse`.

    robsparse bench sparse --arch resnet18 --arch small_resnet --size 32 --json sparse.json
    python benchmarks/speed_plot.py sparse.json docs/pictures/speed_against_sparsity.png

The left panel has the gradient of the images (crafting and attacks), the right one whole training
steps of BCS with PGD-10. The speed is that of our own dense network in the same run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from robsparse.figures.plots import style

DENSITIES = (50, 20, 10, 5, 1)  # ticks
SPEEDS = (0.5, 1, 2, 4, 8)
PANELS = {"gradient": "Gradient of the images", "step": "Training step of BCS, PGD-10"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSON file of `robsparse bench sparse`")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    measured = json.loads(arguments.rows.read_text())
    draw(measured["rows"], measured["device"], arguments.picture)


def draw(rows: list[dict[str, Any]], device: str, picture: Path) -> None:
    """Draw one panel for each kind of row, one line for each arch and precision."""
    with style.applied():
        figure, [panels] = style.panels(1, len(PANELS), sharey=True)
        figure.set_layout_engine("constrained")
        for axes, (kind, title) in zip(panels, PANELS.items(), strict=True):
            _panel(axes, series(rows, kind))
            axes.set_title(title)
        panels[0].set_ylabel("speed (dense = 1)")
        panels[0].legend()
        figure.suptitle(device, fontsize="medium")
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=150)


def series(rows: list[dict[str, Any]], kind: str) -> dict[str, list[tuple[float, float]]]:
    """Return (density in %, ratio) of one kind of row, for each "arch precision"."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        _, of, arch, sparsity, precision = row["case"].split()
        if of == kind:
            density = round(100 * (1 - float(sparsity)), 6)
            found.setdefault(f"{arch} {precision}", []).append((density, row["ratio"]))
    return found


def _panel(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    looks = zip(style.COLOURS, style.MARKERS, strict=False)
    for (name, points), (colour, marker) in zip(lines.items(), looks, strict=False):
        densities, ratios = zip(*sorted(points), strict=True)
        axes.plot(densities, ratios, color=colour, marker=marker, label=name)
    axes.axhline(1, color="0.4", linestyle="--", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="active weights (%)")
    axes.set_xticks(DENSITIES, [f"{value:g}" for value in DENSITIES])
    axes.set_yticks(SPEEDS, [f"{value:g}" for value in SPEEDS])
    axes.minorticks_off()
    axes.invert_xaxis()


if __name__ == "__main__":
    main()
