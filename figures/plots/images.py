"""Test images that an attack breaks for one method and not for another: table and pictures.

Import path: robsparse.figures.plots.images
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import (
    Broken,
    Group,
    cells,
    cells_at,
    groups,
    methods,
    seeds,
    sparsities,
)
from robsparse.figures.plots import style
from robsparse.figures.plots.style import Plot
from robsparse.figures.text.captions import grades_note, plot_caption
from robsparse.figures.text.formats import join, marked, percent
from robsparse.study.cells import Cell

_KEYS = ["dataset", "arch", "objective", "sparsity", "seed", "image", "label"]
_COLUMNS = [*_KEYS, "robust", "broken", "misclassified"]
_ROWS = {1: 6, 2: 3}  # number of groups -> images shown for each group; 2 if there are more groups
_MOST_GROUPS = 6
_SHARES = (1.0, 1.0, 1.0, 2.0)  # widths of three pictures and of the text beside them
_LETTERS = 6.5  # points, of the text


def disagreements(material: Material) -> pd.DataFrame:
    """Return the test images that the strongest attack breaks for one method and not for another.

    Returns:
        One row for each image. Columns: the keys of the networks and their first seed; `image` (its
        index among the attacked images) and `label`; `robust`, `broken` and `misclassified` (the
        clean image): names of methods, separated by spaces. The dense network is compared at every
        sparsity.
    """
    study, rows = material.study, []
    for group in groups(study):
        first = seeds(study, group)[0]
        for sparsity in sparsities(study, group):
            found = _outcomes(material, group, sparsity, first)
            if len(found) < 2:
                continue
            clean = {name: pair[0] for name, pair in found.items()}
            robust = {name: pair[1] for name, pair in found.items()}
            broken = {name: clean[name] & ~robust[name] for name in found}
            apart = np.any(list(robust.values()), axis=0) & np.any(list(broken.values()), axis=0)
            labels = _labels(material, group)
            for image in np.flatnonzero(apart):
                words = [
                    " ".join(name for name, flags in kind.items() if flags[image])
                    for kind in (robust, broken, {n: ~flags for n, flags in clean.items()})
                ]
                place = (*vars(group).values(), sparsity, first, image, labels[image])
                rows.append(dict(zip(_COLUMNS, (*place, *words), strict=True)))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _outcomes(
    material: Material, group: Group, sparsity: float, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each method which images are correct: clean, and under the strongest attack."""
    found = {}
    for name in methods(material.study, group):
        cell = _cell(material, group, name, sparsity, seed)
        if cell is None:
            continue
        clean = material.outcomes.correct(cell, material.primary, "clean")
        robust = material.outcomes.correct(cell, material.primary, STRONGEST)
        if clean is not None and robust is not None:
            found[name] = (clean, robust)
    return found


def _cell(material: Material, group: Group, method: str, sparsity: float, seed: int) -> Cell | None:
    found = cells_at(material.study, group, method, sparsity)
    return next((cell for cell in found if cell.seed == seed), None)


def _labels(material: Material, group: Group) -> np.ndarray:
    found = (material.outcomes.labels(c, material.primary) for c in cells(material.study, group))
    return next(labels for labels in found if labels is not None)


def pictures(material: Material) -> Plot:
    """Draw some of the images of `disagreements`: clean, adversarial, and the difference."""
    label = material.study.label("attack", STRONGEST)
    caption = [
        f"Test images that {label} breaks for one method and not for another, at the highest "
        "sparsity. The images with the most equal numbers of robust and broken methods are shown. "
        "Left: clean image; middle: adversarial image for the method above it; right: change of "
        "each pixel, from black (largest decrease) over grey (none) to white (largest increase); "
        "the largest change of a pixel of the image is above it. All such images: "
        "tables/disagreements.csv.",
        *grades_note(material, filling=False),
        plot_caption(material, attacked=True, selected=True),
    ]
    shown = _chosen(material)
    if not shown:
        return style.empty(f"All methods agree on every image under {label}.", caption[-1:])
    inches = style.figure_inches(6.4)
    texts = [_text(material, place, inches * _SHARES[3] / sum(_SHARES)) for place, _, _ in shown]
    lines = max(text.count("\n") + 1 for text in texts)
    height = max(inches / sum(_SHARES) + 0.45, lines * 1.3 * _LETTERS / 72 + 0.1)
    figure, axes = style.panels(
        len(shown), 4, width=1.6, height=height, unbroken=True, scaled=False, width_ratios=_SHARES
    )
    for row, text, (place, method, broken) in zip(axes, texts, shown, strict=True):
        _draw(row, material, place, method, broken)
        style.bare(row[3])
        written = row[3].text(
            0, 0.5, text, fontsize=_LETTERS, va="center", transform=row[3].transAxes
        )
        written.set_in_layout(False)  # it fits its panel
    return style.finish(figure, [], caption)


def _chosen(material: Material) -> list[tuple[pd.Series, str, Broken]]:
    """The images to draw: row of `disagreements`, a method that it is broken for, its pictures."""
    study, table = material.study, disagreements(material)
    found = []
    for group in groups(study)[:_MOST_GROUPS]:
        own = group.select(table)
        own = own[own.sparsity == own.sparsity.max()]
        divided = own.robust.str.split().str.len().sub(own.broken.str.split().str.len()).abs()
        wanted = _ROWS.get(len(groups(study)), 2)
        for _, place in own.loc[divided.sort_values(kind="stable").index].iterrows():
            pair = _picture(material, group, place)
            if pair is not None and wanted:
                found.append((place, *pair))
                wanted -= 1
    return found


def _picture(material: Material, group: Group, place: pd.Series) -> tuple[str, Broken] | None:
    for method in place.broken.split():
        cell = _cell(material, group, method, place.sparsity, place.seed)
        if cell is not None:
            kept = material.outcomes.pictures(cell, material.primary, STRONGEST)
            if place.image in kept:
                return method, kept[place.image]
    return None


def _labels_of(material: Material, place: pd.Series) -> dict[str, str]:
    """Printed names of the methods by method, with the mark of their grade."""
    lines = material.summary[material.summary.selection == material.primary]
    keys = ["dataset", "arch", "objective"]
    lines = lines[np.logical_and.reduce([lines[k] == place[k] for k in keys])]
    lines = lines[lines.sparsity.isin([0.0, place.sparsity])]
    return {
        line.method: marked(material.study.label("method", line.method), line.reliability).replace(
            " ", "\N{NO-BREAK SPACE}"
        )
        for line in lines.itertuples()
    }


def _draw(
    row: list[Axes], material: Material, place: pd.Series, method: str, broken: Broken
) -> None:
    change = broken.perturbed.astype(np.float32) - broken.clean
    # In norms other than L-inf, a pixel changes by much less than eps.
    largest = float(np.abs(change).max()) or 1.0
    for panel, image in zip(
        row, (broken.clean, broken.perturbed, 0.5 + change / (2 * largest)), strict=False
    ):
        drawn = np.clip(np.moveaxis(image.astype(np.float32), 0, -1), 0, 1)
        panel.imshow(
            drawn.squeeze(-1) if drawn.shape[-1] == 1 else drawn, cmap="gray", vmin=0, vmax=1
        )
        style.bare(panel)
        panel.spines[:].set(visible=True, color="0.8")
    labels = _labels_of(material, place)
    row[0].set_title(f"image {place.image}\nclass {place.label}", fontsize=7)
    row[1].set_title(f"{labels[method]}\nclass {broken.predicted}", fontsize=7)
    row[2].set_title(f"change\nat most {largest:.2g}", fontsize=7)


def _text(material: Material, place: pd.Series, inches: float) -> str:
    """The networks that an image divides, in lines of so many inches."""
    labels = _labels_of(material, place)
    names = {
        kind: join(labels[n] for n in place[kind].split())
        for kind in ("robust", "broken", "misclassified")
    }
    words = [f"{place.dataset}, {place.arch},", f"{place.objective}, {percent(place.sparsity)}"]
    words += [f"{kind}: {text}" for kind, text in names.items() if text != "n/a"]
    letters = int(inches * 72 / (0.6 * _LETTERS))
    return "\n".join(line for part in words for line in style.wrap(part, letters))
