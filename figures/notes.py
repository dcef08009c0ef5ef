"""The words around numbers: labels, captions and the notes under every table.

Import path: robsparse.figures.notes
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from robsparse.figures import compare, statistics
from robsparse.figures.summary import STRONGEST, Material
from robsparse.figures.tidy import Group, cells, methods, seeds, sparsities
from robsparse.schema import Grid
from robsparse.schema.sections import Budget
from robsparse.study.study import Study

NONE = "n/a"
FEW_SEEDS = 5  # fewer than this can hardly tell methods apart; see docs/statistics.md
SMALL = "Small study: not comparable with published numbers."
UNRELIABLE, FAILED, MISSED = "†", "§", "¶"
SELECTION_RULES = {
    "best_val": "the epoch with the best PGD accuracy on held-out training images, "
    "among those in which the network is at its sparsity",
    "last": "the last epoch",
}
OBJECTIVES = {
    "natural": "plain training",
    "at": "adversarial training",
    "mat": "mixed-batch adversarial training",
    "trades": "TRADES",
    "mart": "MART",
    "rst": "robust self-training",
}


def objective(name: str) -> str:
    """An objective by its name in the config, and in words."""
    return f"{name} ({OBJECTIVES[name]})" if name in OBJECTIVES else name


def percent(share: float) -> str:
    """0.95 -> "95 %"; never rounded, for sparsities."""
    return f"{100 * share:.10g} %"


def radius(eps: float) -> str:
    """An eps in [0,1] pixel units, as n/255 where it is a whole number of grey levels."""
    levels = round(eps * 255, 6)
    return f"{levels:g}/255" if levels == round(levels) else f"{eps:g}"


def join(values: Iterable[object]) -> str:
    """Distinct values in order, "n/a" if there is none; a whole number loses its ".0"."""
    known = (value for value in values if not pd.isna(value) and value != "")
    texts = [f"{value:.12g}" if isinstance(value, float) else str(value) for value in known]
    return ", ".join(dict.fromkeys(texts)) or NONE


def epochs(study: Study, results: pd.DataFrame) -> str:
    """Epochs of each method, dense pretraining included: "30 (Dense), 60 (LWM, BCS)"."""
    by_count: dict[str, list[str]] = {}
    for method in methods(study):
        count = join(results[results.method == method].epochs.sort_values())
        by_count.setdefault(count, []).append(study.label("method", method))
    return "; ".join(f"{count} ({', '.join(names)})" for count, names in by_count.items())


def started_from(study: Study) -> str:
    """A sentence on the methods that start from another's network, or ""."""
    starts: dict[str, dict[str, None]] = {}
    for cell in study.cells():
        start = study.starting_cell(cell)
        if start:
            label = study.label("method", cell.method)
            starts.setdefault(start.method, {})[label] = None
    return " ".join(
        f"{', '.join(names)} start{'s' * (len(names) == 1)} from the trained "
        f"{study.label('method', start)} "
        f"network; its epochs are included."
        for start, names in starts.items()
    )


def threat(study: Study, results: pd.DataFrame) -> str:
    """Norm, radius and the budget of each attack."""
    parts = [f"{study.threat.norm}, eps {radius(study.threat.eps)} in [0,1] pixel units"]
    for attack, rows in results[results.attack != "clean"].groupby("attack", sort=False):
        words = [study.label("attack", str(attack))]
        if rows.steps.notna().any():
            words.append(f"{join(rows.steps)} steps")
        if rows.restarts.notna().any():
            words.append(f"x {join(rows.restarts)} restarts")
        if (rows.version != "").any() and not study.qualifier(str(attack)):
            words.append(f"version {join(rows.version)}")
        attacked = (join(rows.norm), rows.eps.iloc[0])
        if attacked != (study.threat.norm, study.threat.eps):
            words.append(f"({attacked[0]}, eps {radius(attacked[1])})")
        parts.append(" ".join(words))
    return "; ".join(parts)


def device(results: pd.DataFrame) -> str:
    """Where networks were trained and attacked."""
    trained, attacked = join(results.train_device), join(results.eval_device)
    return trained if trained == attacked else f"trained on {trained}, attacked on {attacked}"


def code(results: pd.DataFrame) -> str:
    """Code version or versions, and whether they had uncommitted changes."""
    versions = results[["code_version", "code_dirty"]].drop_duplicates()
    return join(
        f"{row.code_version}{' (with uncommitted changes)' * bool(row.code_dirty)}"
        for row in versions.itertuples()
    )


def other_code(results: pd.DataFrame) -> str:
    """A sentence if rows were made by other code than that which collected them."""
    others = int((results.other_code != "").sum())
    if not others:
        return ""
    return (
        f"{others} of {len(results)} rows were made by other code than that which collected them "
        "(results.csv, columns code_digest and other_code)."
    )


def table_notes(material: Material, group: Group) -> list[str]:
    """What stands under the main table of a group: one sentence or two an entry."""
    study, results = material.study, group.of(material.tidy.results)
    images = join(results.n_examples)
    notes = [SMALL] if study.small else []
    notes += incomplete(material, group)
    notes += [
        f"Accuracy in % of the first {images} test images of {group.dataset}, mean ± sample "
        f"standard deviation over the seeds {join(seeds(study, group))} (n = "
        f"{len(seeds(study, group))}); a number without ± is of one seed, {NONE} was not measured.",
        seeds_note(material, group),
        *_definition(material, group),
        f"Objective: {objective(group.objective)}. "
        f"Epochs: {epochs(study, results)}. {started_from(study)}".strip(),
        *trained_otherwise(study, group),
        *_elsewhere(material, group),
        *_attacked_as_it_is(material, group),
        "Selection: "
        + "; ".join(f"{name} = {SELECTION_RULES[name]}" for name in study.evaluation.selections)
        + ".",
        f"Threat: {threat(study, results)}.",
        f"Nonzero weights: prunable weights that are not zero, of {join(results.prunable)} "
        "(biases and batch norm are not prunable), mean over seeds. Peak: the most prunable "
        "weights that training had to hold in any epoch.",
        f"Device: {device(results)}. Code: {code(results)}. {other_code(results)}".strip(),
    ]
    if any(compare.winner(material, group, s) for s in sparsities(study, group)):
        notes.append(
            "Bold: ahead of every other sparse method at its sparsity; each paired difference has "
            "p < 0.05, corrected for their number (Holm)."
        )
    return notes + marks(material, group)


def trained_otherwise(study: Study, group: Group) -> list[str]:
    """A sentence for each budget of training, and for each deviation from the study."""
    blocks = study.blocks()
    notes = [_budget(study, block, block.budget) for block in blocks if block.budget is not None]
    usual = _flat(study.training.model_dump(mode="json"))
    found: dict[str, dict[str, None]] = {}
    for cell in cells(study, group):
        own = _flat(study.training_of(cell).model_dump(mode="json"))
        apart = ", ".join(f"{key} {value}" for key, value in own.items() if usual[key] != value)
        if apart:
            found.setdefault(apart, {})[study.label("method", cell.method)] = None
    notes += [f"Trained otherwise than the rest: {', '.join(m)} ({a})." for a, m in found.items()]
    return notes


def _budget(study: Study, block: Grid, budget: Budget) -> str:
    unit = {"epochs": "epochs", "passes": "passes over each training image"}[budget.unit]
    names = [study.label("method", n) for n in block.methods if not study.is_dense(n)]
    return (
        f"Budget: {budget.total} {unit} of training for each network of {', '.join(names)}, "
        "the dense network that it starts from included."
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "augmentation":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _elsewhere(material: Material, group: Group) -> list[str]:
    study, results = material.study, group.of(material.tidy.results)
    names = [n for n in methods(study, group) if study.is_external(n)]
    if not names:
        return []
    origins = {
        name: f"{study.label('method', name)} "
        f"({join([*results[results.method == name].origin, study.source(name)][:1])})"
        for name in names
    }
    notes = [
        "Trained elsewhere, and attacked here with the weights as given: "
        f"{', '.join(origins.values())}. How they were trained and selected is not known to this "
        "suite."
    ]
    foreign = [study.label("method", name) for name in names if study.source(name).foreign]
    if foreign:
        notes.append(
            "Of an architecture of their own, built by code that is not of this suite: "
            f"{', '.join(foreign)}."
        )
    return notes


def _attacked_as_it_is(material: Material, group: Group) -> list[str]:
    """A sentence when the frozen view of a network did not do, else nothing."""
    study, results = material.study, group.of(material.tidy.results)
    names = results[results.attacked_on == "network"].method
    labels = [study.label("method", n) for n in names.unique() if not study.source(n).foreign]
    if not labels:
        return []
    return [f"Attacked on the network itself, because its frozen view did not do: {join(labels)}."]


def _definition(material: Material, group: Group) -> list[str]:
    results = group.of(material.tidy.results)
    parts = results[(results.attack == STRONGEST) & (results.component != "all")].component
    if parts.empty:
        return []
    return [
        f"{material.study.label('attack', STRONGEST)} accuracy: worst case per image. An image "
        "counts only if it is classified correctly and stays so under every component "
        f"({join(parts)})."
    ]


def incomplete(material: Material, group: Group) -> list[str]:
    """A sentence when networks of the grid have no results, else nothing."""
    lines = group.of(material.summary)
    lacking = int((lines.seeds_planned - lines.seeds).sum())
    if not lacking:
        return []
    return [
        f"Incomplete: {lacking} of {int(lines.seeds_planned.sum())} networks (counted once a "
        f"selection) have no results yet."
    ]


def marks(material: Material, group: Group) -> list[str]:
    """What the marks in a group's table mean, and the text of each."""
    lines = group.of(material.summary)
    meanings = {
        "potentially_unreliable": f"{UNRELIABLE} potentially unreliable: its accuracy under "
        "attack may be too high",
        "failure": f"{FAILED} training failed, so this is no result of the method",
        "budget": f"{MISSED} not at the sparsity that was asked for",
    }
    notes = []
    for column, meaning in meanings.items():
        said = [
            f"{line_name(material.study, row.method, row.sparsity)} {row.selection}, {row[column]}"
            for _, row in lines[lines[column] != ""].iterrows()
        ]
        if said:
            notes.append(f"{meaning}: {'. '.join(said)}.")
    return notes


def line_name(study: Study, method: str, sparsity: float) -> str:
    """A method at a sparsity, as in "LWM 90 %"; dense has none."""
    suffix = "" if study.is_dense(method) else f" {percent(sparsity)}"
    return study.label("method", method) + suffix


def interval_note(material: Material) -> str:
    """What intervals are over, for every caption that shows one."""
    level = f"{100 * statistics.LEVEL:g} % intervals"
    counts = sorted(set(material.summary.seeds) - {0})
    if not counts or counts[-1] > 1:
        alone = "; with one seed over test images alone" if 1 in counts else ""
        return f"{level} over seeds and test images{alone}"
    return f"{level} over test images alone, as there is one seed: other seeds may lie outside"


def seeds_note(material: Material, group: Group) -> str:
    """What so many seeds can say about methods."""
    count = int(group.of(material.summary).seeds.max())
    if count < 2:
        return (
            "One seed: the numbers are of these networks. Other seeds may order the methods "
            "otherwise, so there are no p-values, no ranks are ruled out and nothing is bold."
        )
    few = (
        f"{count} seeds: only differences that are large beside the spread of the seeds can be "
        "told from chance. "
    )
    return f"{few if count < FEW_SEEDS else ''}Methods that are not separated need not be equal."


def unreliable_note(material: Material) -> list[str]:
    """What a dagger in a plot means, if there is one."""
    if not (material.summary.potentially_unreliable != "").any():
        return []
    return [
        f"{UNRELIABLE}: potentially unreliable, may be too high; the reasons: below the main table."
    ]


def plot_caption(material: Material, *, attacked: bool, selected: bool) -> str:
    """The lines under a plot.

    Args:
        material: what was drawn.
        attacked: whether the plot shows accuracies on test images.
        selected: whether it shows selected networks rather than their training.
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
            f"Epochs: {epochs(study, results)}, pretraining included.",
            selection if selected else "Training curves: no selection.",
            f"{study.threat.norm} eps {radius(study.threat.eps)}. Device: {device(results)}.",
            *([SMALL] if study.small else []),
        ]
    )
