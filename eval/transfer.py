"""Black-box transfer attack: PGD on another network of the study, the surrogate.

The attacked network classifies the resulting images once.

Source: Papernot et al., "Practical black-box attacks against machine learning", 2017. Where it
breaks more images than the white-box attacks do, those were misled.
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
    """Each step is relative_step * eps / steps long, from a uniform random start."""

    surrogate: Name = Field(
        "dense",
        description="method of the grid whose network the images are crafted on: of the same data "
        "set, with another seed where there is one, never the attacked network itself",
    )
    steps: PositiveInt = 50
    relative_step: PositiveFloat = 2.5


def passes(params: Params) -> tuple[int, int]:
    """Forward-and-backward passes and forward-only passes over an image."""
    return params.steps, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Which images survive what the surrogate was broken by."""
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
