"""Static random sparsity: a random mask with Erdos-Renyi-Kernel shares, trained from scratch.

Source: RigL (Evci et al., ICML 2020), its baseline "static" with the distribution of section 3.
What rewiring is worth is the difference to this.
"""

from torch import Tensor

from robsparse.schema import FromScratch, Strict
from robsparse.sparsity.budgets import erk_keep_counts
from robsparse.sparsity.masks import random_masks
from robsparse.training.stages import FixedMaskStage, Run, Stage

LABEL = "Static random"


class Params(Strict):
    """train: how the masked network is trained."""

    train: FromScratch = FromScratch()


def masks(run: Run) -> dict[str, Tensor]:
    """Random positions, shares by layer size."""
    return random_masks(run.model, erk_keep_counts(run.model, run.sparsity), run.generator)


def stages(params: Params) -> list[Stage]:
    """One stage from scratch."""
    return [FixedMaskStage("train", params.train, masks)]
