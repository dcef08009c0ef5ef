"""Flying Bird: dynamic sparse training for robust generalisation.

Source: Chen et al., "Sparsity winning twice", ICLR 2022; behaviour of
VITA-Group/Sparsity-Win-Robust-Generalization as its published command runs it: layer shares by
ideal gas quotas, every 900 steps (1,200 in the second half) the share of the smallest weights of
each layer that falls along a cosine from 0.5 to 0.005 gives way to random new ones.

Differs from the authors' code:
- as many weights are grown as were dropped, exactly (theirs: in expectation, where growth is
  random), so the budget holds at every step;
- batch norm is in eval mode while crafting, as for all methods (`crafting.bn_mode: train` in a
  block's `training` is theirs);
- weights are selected on held-out images by PGD as for all methods.
Flying Bird+ changes its sparsity as it goes and has no place in a table by sparsity.
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
        "quotas", description="live weights of layers: ideal gas quotas, or Erdos-Renyi-Kernel"
    )
    growth: Literal["random", "gradient"] = Field(
        "random", description="where weights are grown: anywhere, or where gradients are largest"
    )
    death_rate: float = Field(0.5, gt=0, lt=1, description="share of each layer exchanged at first")
    update_every: PositiveInt = Field(900, description="steps between exchanges, first half")
    late_update_every: PositiveInt = Field(1200, description="steps between them, second half")


class FlyingBirdStage(DynamicStage):
    """Exchanges follow steps."""

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
        """Rounded up, as the authors do."""
        return math.ceil(self.fraction(run) * int(mask.sum()))

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        if self.params.growth == "gradient":
            return gradient.abs()
        return torch.rand(gradient.shape, generator=run.generator, device=gradient.device)


def stages(params: Params) -> list[Stage]:
    """One stage from scratch."""
    return [FlyingBirdStage(params)]
