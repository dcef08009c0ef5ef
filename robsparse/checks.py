"""What only a whole study shows to be wrong, said before anything is trained. No torch in here.

Every check yields lines `key = value: what was expected`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robsparse.fields import radius_fault
from robsparse.sections import Grid, Reach, Training
from robsparse.study import Study


def faults(study: Study) -> list[str]:
    """All faults of a study whose parts are valid, one a line."""
    return [*_attack_radii(study), *_training_radii(study), *_extra_images(study)]


def _said(key: str, value: Any, expected: str) -> str:
    return f"{key} = {json.dumps(value)}: expected {expected}"


def _trainings(study: Study) -> Iterator[tuple[str, Training, list[Grid]]]:
    """Every way in which networks are trained: the key of its settings, these, and its blocks."""
    shared = [block for block in study.blocks() if block.training is None]
    if shared:
        yield "training", study.training, shared
    for block in study.blocks():
        if block.training is not None:
            yield f"{study.key_of(block)}.training", block.training, [block]


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


def _training_radii(study: Study) -> Iterator[str]:
    """Radii and crafting steps that are none in the norm, and steps that leave the ball.

    One step may be twice eps long, so that it crosses the ball (fast adversarial training takes
    1.25 eps); the steps of several are at most eps.
    """
    for key, training, _ in _trainings(study):
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


def _extra_images(study: Study) -> Iterator[str]:
    """Robust self-training without its extra images."""
    for key, training, blocks in _trainings(study):
        path = training.rst_file
        wanted = any("rst" in block.objectives for block in blocks)
        if wanted and (path is None or not Path(path).is_file()):
            yield (
                f"{key}.rst_file = {json.dumps(path)}: the objective 'rst' needs a file of "
                "pseudo-labelled extra images, an npz with the arrays 'images' and 'labels'; the "
                "authors took theirs from TinyImages, which was withdrawn, so there is none to "
                "download"
            )
