"""Flying Bird: dynamic sparse training for robust generalisation.

Source: Chen et al., "Sparsity winning twice", ICLR 2022; behaviour of the published command of
VITA-Group/Sparsity-Win-Robust-Generalization. Ideal gas quotas set the densities of the layers.
Every 900 steps (1,200 in the second half of training) each layer drops a share of its smallest
weights and grows new ones at random positions. The share falls along a cosine from 0.5 to 0.005.

Differs from the authors' code:
- The number of grown weights equals the number of dropped weights, so the budget holds at every
  step. In the authors' code it is equal only in expectation if growth is random.
- Batch norm is in eval mode while adversarial images are crafted, as for all methods (theirs:
  `crafting.bn_mode: train` in a block's `training`).
- Weights are selected by PGD on validation images, as for all methods.
Flying Bird+ is not included: it changes its sparsity during training, so a table by sparsity cannot
show it.
"""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from robsparse.schema import FromScratch, Strict
from robsparse.sparsity.budgets import erk_keep_counts, quota_keep_counts
from robsparse.sparsity.masks import random_masks
from robsparse.training.dynamic import DynamicStage
from robsparse.training.stages import Run, Stage

LABEL = "Flying Bird"
LOWEST_RATE = 0.005


class Params(Strict):
    """train: how the network is trained; the defaults are the authors'."""

    train: FromScratch = FromScratch()
    init: Literal["quotas", "erk"] = Field(
        "quotas", description="densities of layers: ideal gas quotas, or Erdos-Renyi-Kernel"
    )
    growth: Literal["random", "gradient"] = Field(
        "random", description="where weights are grown: at random, or where gradients are largest"
    )
    death_rate: float = Field(0.5, gt=0, lt=1, description="share of each layer exchanged at first")
    update_every: PositiveInt = Field(900, description="steps between exchanges, first half")
    late_update_every: PositiveInt = Field(1200, description="steps between exchanges, second half")


class FlyingBirdStage(DynamicStage):
    """Train; exchange connections after some steps."""

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params

    def initial_masks(self, run: Run) -> dict[str, Tensor]:
        counts = quota_keep_counts if self.params.init == "quotas" else erk_keep_counts
        return random_masks(run.model, counts(run.model, run.sparsity), run.generator)

    def due(self, run: Run) -> bool:
        late = run.epoch > self.fit.epochs / 2
        every = self.params.late_update_every if late else self.params.update_every
        return (run.step + 1) % every == 0 and run.step + 1 < run.steps

    def fraction(self, run: Run) -> float:
        falling = (1 + math.cos(math.pi * (run.step + 1) / run.steps)) / 2
        return LOWEST_RATE + (self.params.death_rate - LOWEST_RATE) * falling

    def dropped_count(self, run: Run, mask: Tensor) -> int:
        """Return how many weights a layer drops, rounded up as in the authors' code."""
        return math.ceil(self.fraction(run) * int(mask.sum()))

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        if self.params.growth == "gradient":
            return gradient.abs()
        return torch.rand(gradient.shape, generator=run.generator, device=gradient.device)


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [FlyingBirdStage(params)]
