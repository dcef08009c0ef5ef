"""Builds a study of one external model (a file, a zoo or a function) without a study file."""

from pathlib import Path
from typing import Any

import yaml

from robsparse.base.errors import UsageError
from robsparse.study import loading
from robsparse.study.study import Study

NAME = "network"


def study_of(
    *,
    weights: Path | None,
    zoo: str | None,
    callable: str | None,
    arch: str | None,
    arch_option: list[str],
    dataset: str,
    data_dir: str | None,
    norm: str,
    eps: str,
    attacks: list[str],
    n_examples: int,
    batch_size: int,
    mean: list[float] | None,
    std: list[float] | None,
    match: str | None,
) -> Study:
    """Return a study of one external model; the arguments are the options of `evaluate`.

    Raises:
        UsageError: if a study does not allow an option.
    """
    if arch_option and weights is None:
        raise UsageError(f"--arch-option {arch_option[0]}: expected --weights beside it")
    options = {
        "file": str(weights) if weights else None,
        "zoo": zoo,
        "callable": callable,
        "arch": arch,
        "match": match,
        "mean": mean,
        "std": std,
    }
    model = {name: value for name, value in options.items() if value is not None}
    model |= {"dataset": dataset, "objective": "natural"}  # the objective is unknown and not used
    data: dict[str, Any] = {
        "study": "single",
        "title": f"{weights or zoo or callable} on {dataset}",
        "models": {NAME: model},
        "archs": {arch: _mapping(arch_option)} if arch else {},
        "datasets": {dataset: {"data_dir": data_dir} if data_dir else {}},
        "threat": {"norm": norm, "eps": eps},
        "training": {"crafting": {"step_size": 0.01}},  # nothing is trained
        "evaluation": {
            "n_examples": n_examples,
            "batch_size": batch_size,
            "selections": {"last": attacks},
        },
    }
    return loading.validate(data, "robsparse evaluate")


def _mapping(options: list[str]) -> dict[str, Any]:
    """Parse options of the form KEY=VALUE; a value is read as YAML."""
    for option in options:
        if "=" not in option:
            raise UsageError(f"--arch-option {option}: expected KEY=VALUE, like width=24")
    return {key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in options)}
