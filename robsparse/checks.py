"""What only a whole study shows to be wrong, said before anything is trained. No torch in here.

Every check yields lines `key = value: what was expected`.
"""

import json
from collections.abc import Iterator
from typing import Any

from robsparse.fields import radius_fault
from robsparse.sections import Reach, Training
from robsparse.study import Study


def faults(study: Study, blocks: list[str]) -> list[str]:
    """All faults of a study whose parts are valid, one a line.

    blocks: the key of each block of the grid, as faults name it.
    """
    trainings = _trainings(study, blocks)
    return [*_attack_radii(study), *_training_radii(study, trainings)]


def _said(key: str, value: Any, expected: str) -> str:
    return f"{key} = {json.dumps(value)}: expected {expected}"


def _trainings(study: Study, blocks: list[str]) -> dict[str, Training]:
    """Every way in which networks are trained, by the key of its settings."""
    found = {
        "training" if block.training is None else f"{key}.training": block.training
        for key, block in zip(blocks, study.grid, strict=True)
    }
    return {key: training or study.training for key, training in found.items()}


def _attack_radii(study: Study) -> Iterator[str]:
    """Attacks whose eps is none in their norm."""
    for name, params in study.evaluation.attacks.items():
        if not isinstance(params, Reach):
            continue
        key, norm = f"evaluation.attacks.{name}.eps", params.norm or study.threat.norm
        if params.eps is None and norm != study.threat.norm:
            yield f"{key}: missing, expected the radius in {norm}; that of the threat is another's"
        elif fault := radius_fault(norm, params.eps or study.threat.eps):
            yield f"{key} = {params.eps}: {fault}"


def _training_radii(study: Study, trainings: dict[str, Training]) -> Iterator[str]:
    """Radii and crafting steps that are none in the norm, and steps that leave the ball.

    One step may be twice eps long, so that it crosses the ball (fast adversarial training takes
    1.25 eps); the steps of several are at most eps.
    """
    for key, training in trainings.items():
        if training.eps and (fault := radius_fault(study.threat.norm, training.eps)):
            yield f"{key}.eps = {training.eps}: {fault}"
            continue
        eps, crafting = study.threat.adjusted(training).eps, training.crafting
        longest = 2 * eps if crafting.steps == 1 else eps
        where = f"{key}.crafting.step_size"
        if fault := radius_fault(study.threat.norm, crafting.step_size):
            yield f"{where} = {crafting.step_size}: {fault}"
        elif crafting.step_size > longest:
            yield _said(
                where,
                crafting.step_size,
                f"at most {'twice ' if crafting.steps == 1 else ''}the eps that is trained "
                f"against; nearest match: {longest:.6g}",
            )
