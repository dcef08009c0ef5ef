"""Projected gradient descent with restarts on the cross entropy; an image counts as robust only if
every restart fails.

Source: Madry et al., ICLR 2018. The defaults are those of the BCS authors' evaluation
(run_foolbox_eval.py): 50 steps of 2.5 * eps / 50, 10 uniform random starts.
"""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse import perturb
from robsparse.config import Strict
from robsparse.datasets import Part
from robsparse.evaluation import AttackThreat, Outcome, batched

LABEL = "PGD"


class Params(Strict):
    """Each step is relative_step * eps / steps long."""

    steps: PositiveInt = 50
    restarts: PositiveInt = 10
    relative_step: PositiveFloat = 2.5


def passes(params: Params) -> tuple[int, int]:
    """Forward-and-backward passes and forward-only passes over an image that survives."""
    return params.steps * params.restarts, params.restarts


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, threat: AttackThreat
) -> Outcome:
    """Which images survive all restarts. A restart sees only the images that survived so far.

    The random starts are drawn for all images at once on the CPU, so that the batch size does not
    change them.
    """
    robust = torch.ones(len(y_N), dtype=torch.bool)
    largest, nans = 0.0, 0
    generator = torch.Generator().manual_seed(threat.seed)
    for _ in range(params.restarts):
        start = perturb.uniform_start(x_NCHW, threat.eps, generator)
        alive = robust.nonzero().squeeze(1)
        if not len(alive):
            break
        batches = batched(Part(x_NCHW[alive], y_N[alive]), threat.batch_size, threat.device)
        starts = start[alive].split(threat.batch_size)
        for (x, y), begin, index in zip(
            batches, starts, alive.split(threat.batch_size), strict=True
        ):
            adversarial = perturb.ascend(
                model,
                x,
                begin.to(threat.device),
                perturb.cross_entropy_of(y),
                eps=threat.eps,
                step_size=params.relative_step * threat.eps / params.steps,
                steps=params.steps,
            )
            with torch.no_grad():
                robust[index] = (model(adversarial).argmax(1) == y).cpu()
            nans += int(adversarial.isnan().sum())
            largest = max(largest, float((adversarial - x).abs().max()))
    settings = {"steps": params.steps, "restarts": params.restarts}
    return Outcome({"all": robust}, settings, max_perturbation=largest, nan_count=nans)
