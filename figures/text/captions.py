"""Captions of plots.

Import path: robsparse.figures.text.captions
"""

from robsparse.figures.data import statistics
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import seeds
from robsparse.figures.text.formats import (
    SELECTION_RULES,
    SMALL,
    UNRELIABLE,
    device,
    epochs,
    join,
    objective,
    radius,
)


def interval_note(material: Material) -> str:
    """What the intervals in a caption are over."""
    level = f"{100 * statistics.LEVEL:g} % intervals"
    counts = sorted(set(material.summary.seeds) - {0})
    if not counts or counts[-1] > 1:
        alone = "; with one seed, over test images only" if 1 in counts else ""
        return f"{level} over seeds and test images{alone}"
    return f"{level} over test images only, because there is one seed: other seeds may lie outside"


def unreliable_note(material: Material) -> list[str]:
    """What the dagger in a plot means, if there is one."""
    if not (material.summary.potentially_unreliable != "").any():
        return []
    return [
        f"{UNRELIABLE}: potentially unreliable, the accuracy may be too high; the reasons are "
        "below the main table."
    ]


def plot_caption(material: Material, *, attacked: bool, selected: bool) -> str:
    """The last paragraph of a plot's caption: what was trained, selected and attacked, and how.

    Args:
        material: what was drawn.
        attacked: the plot shows accuracies on test images.
        selected: the plot shows selected networks, not training curves.
    """
    study, results = material.study, material.tidy.results
    sample = f"seeds {join(seeds(study))} (n = {len(seeds(study))})"
    if attacked:
        sample = f"n = {join(results.n_examples)} test images, {sample}"
    objectives = dict.fromkeys(cell.objective for cell in study.cells())
    selection = f"Selection: {material.primary} ({SELECTION_RULES[material.primary]})."
    return " ".join(
        [
            f"{study.title}: {sample}.",
            f"Objective: {', '.join(map(objective, objectives))}.",
            f"Epochs: {epochs(study, results)}, including pretraining.",
            selection if selected else "Training curves: no selection.",
            f"{study.threat.norm} eps {radius(study.threat.eps)}. Device: {device(results)}.",
            *([SMALL] if study.small else []),
        ]
    )
