"""Black-box transfer attack: PGD on another network of the study, the surrogate.

The attacked network classifies the resulting images once. If this attack breaks more images than
the white-box attacks, the gradients of the network misled the white-box attacks.

Source: Papernot et al., "Practical black-box attacks against machine learning", 2017.
"""

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.tally import Tally
from robsparse.schema import AttackParams, Name

LABEL = "Black-box transfer attack"


class Params(AttackParams):
    """Each step has the length relative_step * eps / steps. The start is uniform and random.

    steps: number of steps.
    relative_step: length of all steps together, as a multiple of eps.
    """

    surrogate: Name = Field(
        "dense",
        description="method that the surrogate was trained with. The surrogate has the same data "
        "set and, if the grid has one, another seed. It is never the attacked network",
    )
    steps: PositiveInt = 50
    relative_step: PositiveFloat = 2.5


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image."""
    return params.steps, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return which images are robust against the adversarial images of the surrogate."""
    tally = Tally(x_NCHW, y_N, context)
    surrogate = context.surrogate(params.surrogate)
    generator = torch.Generator().manual_seed(context.seed)
    start = perturb.uniform_start(x_NCHW, context.eps, generator, context.norm)

    def craft(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return perturb.ascend(
            surrogate,
            x,
            start[index].to(context.device),
            perturb.cross_entropy_of(y),
            eps=context.eps,
            step_size=params.relative_step * context.eps / params.steps,
            steps=params.steps,
            norm=context.norm,
        )

    with perturb.no_parameter_gradients(surrogate):
        tally.attack(model, craft)
    return tally.outcome({"steps": params.steps, "restarts": 1})
