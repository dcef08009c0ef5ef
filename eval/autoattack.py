"""AutoAttack: APGD-CE, targeted APGD-DLR, targeted FAB and Square, worst case over all four.

Source: Croce and Hein, ICML 2020, through the package pyautoattack. Its components are run one at a
time on the images that are still robust, which is what its own evaluation does, so that the
outcome of each is kept; a test compares the two image for image.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robsparse import perturb
from robsparse.config import Strict
from robsparse.evaluation import AttackThreat, Outcome

LABEL = "AutoAttack"

# pyautoattack warns when Square lowers the accuracy by more than this; run alone it cannot tell.
SQUARE_MARGIN = 0.002


class Params(Strict):
    """version: the package's preset of components and their budgets."""

    version: Literal["standard", "plus", "rand"] = "standard"


def passes(params: Params) -> tuple[int, int]:
    """Forward-and-backward passes and forward-only passes over an image that survives.

    With ten classes: APGD-CE 100 steps, APGD-T and FAB-T 100 steps for each of 9 targets, Square
    5,000 queries; "plus" adds APGD and FAB with 5 restarts, "rand" averages 20 gradients a step.
    """
    return {"standard": (1900, 5900), "plus": (3400, 6900), "rand": (4000, 200)}[params.version]


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, threat: AttackThreat
) -> Outcome:
    """Which images survive each component, and what the package warned of."""
    attack = AutoAttack(
        model,
        norm=threat.norm,
        eps=threat.eps,
        version=params.version,
        seed=threat.seed,
        device=threat.device,
    )
    if len(x_NCHW):
        with torch.no_grad():
            classes = model(x_NCHW[:1].to(threat.device)).shape[1]
        # The package fixes nine targets; with fewer classes it would look for labels beyond them.
        for part in (attack.apgd_targeted, attack.fab):
            part.n_target_classes = min(part.n_target_classes, classes - 1)
    robust = torch.ones(len(y_N), dtype=torch.bool)
    components: dict[str, Tensor] = {}
    warnings: dict[str, None] = {}
    largest, nans = 0.0, 0
    for component in list(attack.attacks_to_run):
        before = int(robust.sum())
        if before:
            attack.attacks_to_run = [component]
            alive = robust.nonzero().squeeze(1)
            # The package seeds torch's global generator and asks for gradients of all weights.
            cuda = [threat.device] if threat.device.type == "cuda" else []
            with (
                _warnings_into(warnings),
                perturb.frozen(model),
                torch.random.fork_rng(devices=cuda),
            ):
                x_adv, y_adv = attack.run_standard_evaluation(
                    x_NCHW[alive], y_N[alive], batch_size=threat.batch_size
                )
            robust[alive] = y_adv == y_N[alive]
            nans += int(x_adv.isnan().sum())
            largest = max(largest, float((x_adv - x_NCHW[alive]).abs().max()))
        components[component] = robust.clone()
        after = int(robust.sum())
        threat.report(f"{component}: {after} of {before} still robust")
        if component == "square" and before - after > SQUARE_MARGIN * len(y_N):
            warnings[
                f"Square broke {before - after} of the {before} images that survived the white-box "
                "attacks, which may be unreliable on this model"
            ] = None
    return Outcome(
        components,
        {"version": params.version},
        list(warnings),
        max_perturbation=largest,
        nan_count=nans,
    )


@contextmanager
def _warnings_into(found: dict[str, None]) -> Iterator[None]:
    """Collect what the package logs as a warning, each text once and in order."""

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.setdefault(record.getMessage().split(" See ")[0])

    logger = logging.getLogger("auto-attack")
    handler = Collect(logging.WARNING)
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.propagate = propagates
        logger.setLevel(level)
        logger.removeHandler(handler)
