"""The notes under the main table.

Import path: robsparse.figures.text.notes
"""

from typing import Any

import pandas as pd

from robsparse.figures.data import compare, reliability
from robsparse.figures.data.summary import STRONGEST, Material
from robsparse.figures.data.tidy import Group, cells, methods, seeds, sparsities
from robsparse.figures.text.formats import (
    FAILED,
    MARKS,
    MISSED,
    NONE,
    SELECTION_RULES,
    SMALL,
    code,
    device,
    epochs,
    join,
    objective,
    percent,
    radius,
)
from robsparse.study.study import Study

FEW_SEEDS = 5  # fewer seeds detect only large differences; see docs/statistics.md


def started_from(study: Study) -> str:
    """A sentence with the methods that start from the network of another method, or ""."""
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


def threat_in_words(study: Study, results: pd.DataFrame) -> str:
    """Norm, radius, and the steps, restarts and version of each attack, as text."""
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


def other_code(results: pd.DataFrame) -> str:
    """A sentence with the number of rows that other code than the collecting code made, or ""."""
    others = int((results.other_code != "").sum())
    if not others:
        return ""
    return (
        f"{others} of {len(results)} rows were made by other code than the code that collected "
        "them (results.csv, columns code_digest and other_code)."
    )


def table_notes(material: Material, group: Group) -> list[str]:
    """The notes under the main table of a group: one or two sentences each, in this order."""
    study, results = material.study, group.select(material.tidy.results)
    return [
        *([SMALL] if study.small else []),
        *_incomplete(material, group),
        _accuracy(study, group, results),
        seeds_note(material, group),
        *_strongest_attack(study, results),
        _training(study, group, results),
        *_budgets(study),
        *_other_settings(study, group),
        *_external_models(study, group, results),
        *_attacked_without_view(study, results),
        _selections(study),
        *_trained_on_validation(study, group),
        f"Threat: {threat_in_words(study, results)}.",
        f"Nonzero weights: prunable weights that are not zero, of {join(results.prunable)} "
        "(biases and batch norm are not prunable), mean over seeds. Peak active weights: the "
        "largest number of active weights in any epoch of training.",
        f"Device: {device(results)}. Code: {code(results)}. {other_code(results)}".strip(),
        *_bold(material, group),
        *marks(material, group),
    ]


def _accuracy(study: Study, group: Group, results: pd.DataFrame) -> str:
    names = seeds(study, group)
    return (
        f"Accuracy in % of the first {join(results.n_examples)} test images of {group.dataset}: "
        f"mean ± sample standard deviation over the seeds {join(names)} (n = {len(names)}). A "
        f"number without ± comes from one seed. {NONE}: not measured."
    )


def _training(study: Study, group: Group, results: pd.DataFrame) -> str:
    text = f"Objective: {objective(group.objective)}. Epochs: {epochs(study, results)}."
    return f"{text} {started_from(study)}".strip()


def _selections(study: Study) -> str:
    rules = (f"{name} = {SELECTION_RULES[name]}" for name in study.evaluation.selections)
    return f"Selection: {'; '.join(rules)}."


def _trained_on_validation(study: Study, group: Group) -> list[str]:
    """A warning that the best epochs were not selected on unseen images."""
    if not getattr(study.datasets[group.dataset], "train_on_validation", False):
        return []
    return [
        "Networks were also trained on the validation images (train_on_validation). The selections "
        "best_val and best_clean are therefore made on images that the networks know; last is not."
    ]


def _bold(material: Material, group: Group) -> list[str]:
    """A sentence about bold numbers, if there is one."""
    if not any(compare.winner(material, group, s) for s in sparsities(material.study, group)):
        return []
    return [
        "Bold: more accurate than every other sparse method at its sparsity; each paired "
        "difference has p < 0.05 after Holm's correction for their number."
    ]


def _budgets(study: Study) -> list[str]:
    """A sentence for each budget of training."""
    found = []
    for block in study.blocks:
        if budget := block.budget:
            unit = {"epochs": "epochs", "passes": "passes over each training image"}[budget.unit]
            names = [study.label("method", n) for n in block.methods if not study.is_dense(n)]
            found.append(
                f"Budget: {budget.total} {unit} of training for each network of "
                f"{', '.join(names)}, including the dense network that it starts from."
            )
    return found


def _other_settings(study: Study, group: Group) -> list[str]:
    """A sentence for each set of training settings that differ from those of the study."""
    general = _flat(study.training.model_dump(mode="json"))
    found: dict[str, dict[str, None]] = {}  # methods by their settings
    for cell in cells(study, group):
        own = _flat(study.planned[cell].training.model_dump(mode="json"))
        other = ", ".join(f"{key} {value}" for key, value in own.items() if general[key] != value)
        if other:
            found.setdefault(other, {})[study.label("method", cell.method)] = None
    return [
        f"Other training settings: {', '.join(labels)} ({settings})."
        for settings, labels in found.items()
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "augmentation":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _external_models(study: Study, group: Group, results: pd.DataFrame) -> list[str]:
    names = [n for n in methods(study, group) if study.is_external(n)]
    if not names:
        return []
    origins = (
        f"{study.label('method', name)} "
        f"({join([*results[results.method == name].origin, study.source(name)][:1])})"
        for name in names
    )
    notes = [
        "External models, trained elsewhere and attacked here with their weights unchanged: "
        f"{', '.join(origins)}. This suite does not know how they were trained and selected."
    ]
    foreign = [study.label("method", name) for name in names if study.source(name).foreign]
    if foreign:
        notes.append(f"Architecture from code outside this suite: {', '.join(foreign)}.")
    return notes


def _attacked_without_view(study: Study, results: pd.DataFrame) -> list[str]:
    """A sentence with the networks of this suite that were attacked without their folded view."""
    names = results[results.attacked_on == "network"].method
    labels = [study.label("method", n) for n in names.unique() if not study.source(n).foreign]
    if not labels:
        return []
    reason = "because the folded view could not be used"
    return [f"Attacked without the folded view, {reason}: {join(labels)}."]


def _strongest_attack(study: Study, results: pd.DataFrame) -> list[str]:
    """A sentence with the definition of the accuracy under the strongest attack, if it ran."""
    parts = results[(results.attack == STRONGEST) & (results.component != "all")].component
    if parts.empty:
        return []
    return [
        f"{study.label('attack', STRONGEST)} accuracy: worst case per image. An image counts only "
        "if it is classified correctly without an attack and under every component "
        f"({join(parts)})."
    ]


def _incomplete(material: Material, group: Group) -> list[str]:
    """A sentence with the number of networks without results, if there are any."""
    lines = group.select(material.summary)
    lacking = int((lines.seeds_planned - lines.seeds).sum())
    if not lacking:
        return []
    return [
        f"Incomplete: {lacking} of {int(lines.seeds_planned.sum())} networks have no results yet "
        "(each selection counts as a network)."
    ]


def marks(material: Material, group: Group) -> list[str]:
    """The meaning of each mark in the table of a group, and the reasons for it."""
    lines = group.select(material.summary)
    grade, limit = lines.reliability, f"{100 * reliability.LIMIT:g}"
    meanings = [
        (
            "potentially_unreliable",
            grade == reliability.UNRELIABLE,
            f"{MARKS[reliability.UNRELIABLE]} unreliable: its accuracy under attack may be far "
            f"too high, because gradients do not lead the attacks, or a stronger attack breaks "
            f"more than {limit} % of the images in addition",
        ),
        (
            "potentially_unreliable",
            grade == reliability.LOOK,
            f"{MARKS[reliability.LOOK]} look: its accuracy under attack may be too high, because "
            f"a stronger attack breaks up to {limit} % of the images in addition",
        ),
        (
            "failure",
            lines.failure != "",
            f"{FAILED} training failed: the number is no result of the method",
        ),
        (
            "budget",
            lines.budget != "",
            f"{MISSED} the network does not have the requested sparsity",
        ),
    ]
    notes = []
    for column, concerned, meaning in meanings:
        reasons = [
            f"{line_name(material.study, row.method, row.sparsity)} {row.selection}, {row[column]}"
            for _, row in lines[concerned].iterrows()
        ]
        if reasons:
            notes.append(f"{meaning}: {'. '.join(reasons)}.")
    return notes


def line_name(study: Study, method: str, sparsity: float) -> str:
    """A method with its sparsity, for example "LWM 90 %"; a dense method without sparsity."""
    suffix = "" if study.is_dense(method) else f" {percent(sparsity)}"
    return study.label("method", method) + suffix


def seeds_note(material: Material, group: Group) -> str:
    """A note about what this number of seeds allows to conclude about methods."""
    count = int(group.select(material.summary).seeds.max())
    if count < 2:
        return (
            "One seed: the numbers are only valid for these networks. With other seeds, the "
            "methods may have another order. So there is no p-value, no rank is ruled out and "
            "nothing is bold."
        )
    few_seeds = (
        f"{count} seeds: only differences that are large compared with the differences between "
        "seeds can be detected. "
    )
    return (
        f"{few_seeds if count < FEW_SEEDS else ''}Methods that are not separated may still differ."
    )
