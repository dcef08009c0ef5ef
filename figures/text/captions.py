"""Captions of plots.

Import path: robsparse.figures.text.captions
"""

from robsparse.figures.data import reliability, statistics
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import seeds
from robsparse.figures.text.formats import (
    SELECTION_RULES,
    SMALL,
    device,
    epochs,
    join,
    objective,
    radius,
)


def interval_note(material: Material) -> str:
    """A note about the intervals in a plot: level, and what they are over."""
    level = f"{100 * statistics.LEVEL:g} % intervals"
    counts = sorted(set(material.summary.seeds) - {0})
    if not counts or counts[-1] > 1:
        one_seed = "; with one seed, over test images only" if 1 in counts else ""
        return f"{level} over seeds and test images{one_seed}"
    reason = "because there is one seed: the accuracy of other seeds may be outside"
    return f"{level} over test images only, {reason}"


def grades_note(material: Material, *, filling: bool) -> list[str]:
    """A note about the grades of the networks, if any is not "fine".

    Args:
        material: the data of the plot.
        filling: whether the filling of a marker shows the grade, and not a sign after a name.
    """
    shown = material.summary.reliability
    if (shown == reliability.FINE).all():
        return []
    look, unreliable = ("half filled", "hollow") if filling else ("°", "†")
    marker = "Marker" if filling else "Sign"
    return [
        f"{marker} {look}: look at the reasons, the accuracy may be too high by up to "
        f"{100 * reliability.LIMIT:g} points. {marker} {unreliable}: potentially unreliable, it "
        "may be far too high. The reasons are below the main table."
    ]


def plot_caption(material: Material, *, attacked: bool, selected: bool) -> str:
    """The last paragraph of a caption: how networks were trained, selected and attacked.

    Args:
        material: the data of the plot.
        attacked: whether the plot shows accuracies on test images.
        selected: whether the plot shows selected networks, and not training curves.
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
