"""The fast gradient sign method: one step of length eps from the clean image.

Source: Goodfellow et al., ICLR 2015. In L2 the step has the direction of the gradient.
"""

from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.tally import Tally
from robsparse.schema import AttackParams

LABEL = "FGSM"


class Params(AttackParams):
    """This attack has no parameters of its own."""


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image."""
    return 1, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return which images are robust against the step."""
    tally = Tally(x_NCHW, y_N, context)

    def craft(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
        loss = perturb.cross_entropy_of(y)
        return perturb.ascend(
            model, x, x, loss, eps=context.eps, step_size=context.eps, steps=1, norm=context.norm
        )

    with perturb.no_parameter_gradients(model):
        tally.attack(model, craft)
    return tally.outcome({"steps": 1, "restarts": 1})
