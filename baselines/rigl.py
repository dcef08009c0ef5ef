"""RigL: drop the smallest weights, grow where the gradient is largest.

Source: Evci et al., ICML 2020, algorithm 1. Every delta_t steps, until the share t_end of training,
each layer exchanges the share alpha / 2 * (1 + cos(pi t / t_end)) of its active weights. Such an
exchange replaces a step of SGD. New weights are 0. Erdos-Renyi-Kernel sets the densities of the
layers. The gradient is the gradient of the robust objective on the current batch.
"""

import math

from pydantic import Field, PositiveInt
from torch import Tensor

from robsparse.schema import FromScratch, Strict
from robsparse.training.dynamic import DynamicStage
from robsparse.training.stages import Run, Stage

LABEL = "RigL"


class Params(Strict):
    """train: how the network is trained."""

    train: FromScratch = FromScratch()
    alpha: float = Field(0.3, gt=0, lt=1, description="share of each layer exchanged at first")
    update_every: PositiveInt = Field(100, description="steps between exchanges (delta_t)")
    t_end: float = Field(
        0.75, gt=0, le=1, description="share of training after which exchanges end"
    )


class RiglStage(DynamicStage):
    """Train; at some steps exchange connections instead of a step of SGD."""

    update_replaces_step = True

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params

    def due(self, run: Run) -> bool:
        regular = run.step > 0 and run.step % self.params.update_every == 0
        return regular and run.step < self.params.t_end * run.steps

    def fraction(self, run: Run) -> float:
        share = run.step / (self.params.t_end * run.steps)
        return self.params.alpha / 2 * (1 + math.cos(math.pi * share))

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        return gradient.abs()


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [RiglStage(params)]
