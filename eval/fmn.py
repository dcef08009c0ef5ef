"""Fast minimum norm: the smallest perturbation that breaks each image, so that one run gives robust
accuracy at every eps.

Source: Pintor et al., NeurIPS 2021, through the package foolbox (LInfFMNAttack, L2FMNAttack).
"""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.compute.perturb import length
from robsparse.evaluation import fast_minimum_norm
from robsparse.evaluation.attacks import AttackContext, Outcome, outcome_from_distances
from robsparse.evaluation.tally import AttackProgress, in_batches
from robsparse.schema import AttackParams

LABEL = "FMN"
GIVES_DISTANCES = True


class Params(AttackParams):
    """steps: gradient steps; max_stepsize: L2 length of the first; gamma: share by which the
    allowed perturbation changes at first. The defaults are the package's.
    """

    steps: PositiveInt = 100
    max_stepsize: PositiveFloat = 1.0
    gamma: PositiveFloat = 0.05


def passes(params: Params) -> tuple[int, int]:
    """Forward-and-backward passes and forward-only passes over an image."""
    return params.steps, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """How far each image has to be moved; it is robust if that is further than eps."""
    distances = torch.full((len(y_N),), torch.inf)
    progress = AttackProgress("FMN", len(y_N), context.report)

    def work(where: slice) -> None:
        x, y = x_NCHW[where].to(context.device), y_N[where].to(context.device)
        found = fast_minimum_norm.perturbed(
            model,
            x,
            y,
            norm=context.norm,
            steps=params.steps,
            max_stepsize=params.max_stepsize,
            gamma=params.gamma,
        )
        with torch.no_grad():
            broken = model(found).argmax(1) != y
        distances[where] = length(found - x, context.norm).where(broken, torch.inf).cpu()
        progress.update(where.stop, int((distances > context.eps).sum()))

    with perturb.no_parameter_gradients(model):
        in_batches(len(y_N), context.batch_size, work, context.report)
    outcome = outcome_from_distances(distances, context.eps, {"steps": params.steps, "restarts": 1})
    progress.close(int(outcome.components["all"].sum()), len(y_N))
    return outcome
