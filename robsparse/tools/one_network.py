"""Builds a study of one external model (a file, a zoo or a function) without a study file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.schema.threat import Norm
from robsparse.study import loading
from robsparse.study.study import Study

NAME = "network"
EPS = {"Linf": "8/255", "L2": "128/255"}  # unless the file of a data set has its own
MOST_EXAMPLES = 1000


def study_of(
    *,
    model: dict[str, Any],
    arch_option: Sequence[str],
    dataset: str,
    dataset_option: Sequence[str],
    place: dict[str, str],
    split_of: Path | None,
    norm: Norm,
    eps: str | None,
    attacks: list[str],
    attack_option: Sequence[str],
    evaluation: dict[str, Any],
) -> Study:
    """Return a study of one external model; the arguments are the options of `evaluate`.

    Args:
        model: settings of a schema.external.External, without the data set.
        arch_option: parameters of the arch, like "width=24".
        dataset: name of the data set.
        dataset_option: parameters of the data set, like "split_seed=1".
        place: file or data_dir of the data set.
        split_of: a study file; the data set has the parameters that it has there.
        norm, eps: the threat; eps None: the usual one of the data set.
        attacks: names of the attacks.
        attack_option: parameters of attacks, like "pgd.steps=20".
        evaluation: settings of the section evaluation. n_examples None: the first MOST_EXAMPLES
            test images, or all of them.

    Raises:
        UsageError: if a study does not allow an option.
    """
    if arch_option and "file" not in model:
        raise UsageError(f"--arch-option {arch_option[0]}: expected --weights beside it")
    options = mapping("--dataset-option", dataset_option)
    own = _dataset_of(split_of, dataset) | options | place
    arch, wanted = model.get("arch"), evaluation["n_examples"]
    given = _attack_options(attack_option, attacks)
    base = str(own.get("base", dataset))
    data: dict[str, Any] = {
        "study": "single",
        "title": f"{model.get('file') or model.get('zoo') or model.get('callable')} on {dataset}",
        # The objective of its training is not known and not used.
        "models": {NAME: model | {"dataset": dataset, "objective": "natural"}},
        "archs": {arch: mapping("--arch-option", arch_option)} if arch else {},
        "datasets": {dataset: own},
        "threat": {"norm": norm, "eps": eps or _usual_eps(base, norm)},
        "training": {"crafting": {"step_size": 0.01}},  # nothing is trained
        "evaluation": evaluation
        | {"n_examples": wanted or 1, "attacks": given, "selections": {"last": attacks}},
    }
    study = loading.validate(data, "robsparse evaluate")
    if wanted is None:
        there = datasets.describe(base, study.datasets[dataset]).test_examples
        data["evaluation"]["n_examples"] = min(there, MOST_EXAMPLES)
        study = loading.validate(data, "robsparse evaluate")
    return study


def _dataset_of(config: Path | None, dataset: str) -> dict[str, Any]:
    """The parameters that a study file has for a data set; {} without a file."""
    if config is None:
        return {}
    study = loading.load(config)
    if dataset not in study.datasets:
        known = ", ".join(study.datasets)
        raise UsageError(f"{config}: no data set '{dataset}', expected one of: {known}")
    return dict((loading.read(config).get("datasets") or {}).get(dataset) or {})


def _usual_eps(dataset: str, norm: Norm) -> str:
    """The radius that is usual for a data set, in pixel units."""
    own = {}
    if dataset in registry.names("dataset"):
        own = registry.entry("dataset", dataset).literals.get("EPS", {})
    return str(own.get(norm, EPS[norm]))


def _attack_options(options: Sequence[str], attacks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parameters of attacks, from options of the form ATTACK.KEY=VALUE."""
    found: dict[str, dict[str, Any]] = {}
    for option in options:
        attack, dot, rest = option.partition(".")
        if not dot or attack not in attacks:
            raise UsageError(
                f"--attack-option {option}: expected ATTACK.KEY=VALUE with an attack of --attacks "
                f"({', '.join(attacks)}), like pgd.steps=20"
            )
        found.setdefault(attack, {}).update(mapping("--attack-option", [rest]))
    return found


def mapping(name: str, options: Sequence[str]) -> dict[str, Any]:
    """Parse options of the form KEY=VALUE; a value is read as YAML.

    Raises:
        UsageError: if an option has another form. `name`: the option in the message.
    """
    found = {}
    for option in options:
        key, equals, text = option.partition("=")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key:
            raise UsageError(f"{name} {option}: expected KEY=VALUE, like width=24")
    return found
