"""Accuracy on the clean images."""

from torch import Tensor, nn

from robsparse.datasets import Part
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.tally import correct_flags
from robsparse.schema import Strict

LABEL = "Clean"


class Params(Strict):
    """This attack has no parameters."""


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for each image."""
    return 0, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return which images are classified correctly."""
    flags = correct_flags(
        model, Part(x_NCHW, y_N), context.batch_size, context.device, context.report
    )
    return Outcome({"all": flags}, max_perturbation=0.0)
