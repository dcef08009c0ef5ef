"""Projected gradient descent with restarts on the cross entropy.

An image counts as robust only if every restart fails.

Source: Madry et al., ICLR 2018. The defaults are those of the BCS authors' evaluation
(run_foolbox_eval.py): 50 steps of length 2.5 * eps / 50, 10 uniform random starts.
"""

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.tally import AttackProgress, Tally
from robsparse.schema import AttackParams

LABEL = "PGD"


class Params(AttackParams):
    """The first step has the length relative_step * eps / steps.

    steps, restarts: numbers of steps, and of starts for each image.
    relative_step: length of all steps together, as a multiple of eps.
    rule: later steps have the same length, or it falls to 0 along a cosine.
    start: drawn uniformly from the ball, or the clean image.
    """

    steps: PositiveInt = 50
    restarts: PositiveInt = 10
    relative_step: PositiveFloat = 2.5
    rule: Literal["constant", "cosine"] = "constant"
    start: Literal["uniform", "image"] = "uniform"


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image that stays robust."""
    return params.steps * params.restarts, params.restarts


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return which images are robust against all restarts.

    A restart attacks only the images that are still robust. The random starts are drawn for all
    images at once on the CPU, so that the batch size does not change them.
    """
    tally = Tally(x_NCHW, y_N, context)
    generator = torch.Generator().manual_seed(context.seed)
    progress = AttackProgress("PGD", len(y_N) * params.restarts, context.report)
    for restart in range(params.restarts):
        start = x_NCHW
        if params.start == "uniform":
            start = perturb.uniform_start(x_NCHW, context.eps, generator, context.norm)

        def craft(x: Tensor, y: Tensor, index: Tensor, start: Tensor = start) -> Tensor:
            return perturb.ascend(
                model,
                x,
                start[index].to(context.device),
                perturb.cross_entropy_of(y),
                eps=context.eps,
                step_size=_step_sizes(params, context.eps),
                steps=params.steps,
                norm=context.norm,
            )

        with perturb.no_parameter_gradients(model):
            tally.attack(model, craft, tally.robust.nonzero().squeeze(1))
        progress.update((restart + 1) * len(y_N), int(tally.robust.sum()))
    progress.close(int(tally.robust.sum()), len(y_N))
    return tally.outcome({"steps": params.steps, "restarts": params.restarts})


def _step_sizes(params: Params, eps: float) -> list[float]:
    first = params.relative_step * eps / params.steps
    if params.rule == "constant":
        return [first] * params.steps
    return [first * (1 + math.cos(math.pi * t / params.steps)) / 2 for t in range(params.steps)]
