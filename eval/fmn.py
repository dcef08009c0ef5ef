"""Fast minimum norm: search for the smallest perturbation that breaks each image.

One run gives the robust accuracy at every eps.

Source: Pintor et al., NeurIPS 2021, with the package foolbox (LInfFMNAttack, L2FMNAttack).
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
    """The defaults are those of the package.

    steps: number of gradient steps. max_stepsize: L2 length of the first step. gamma: relative
    change of the allowed perturbation in the first step.
    """

    steps: PositiveInt = 100
    max_stepsize: PositiveFloat = 1.0
    gamma: PositiveFloat = 0.05


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image."""
    return params.steps, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return the smallest perturbation found for each image; above eps the image is robust."""
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
