"""Static random sparsity: a random mask with Erdos-Renyi-Kernel densities, trained from scratch.

Source: the baseline "static" of RigL (Evci et al., ICML 2020), with the distribution of section 3.
A comparison with this method shows the effect of rewiring.
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
    """Return random masks with Erdos-Renyi-Kernel densities."""
    return random_masks(run.model, erk_keep_counts(run.model, run.sparsity), run.generator)


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights under a mask."""
    return [FixedMaskStage("train", params.train, masks)]
