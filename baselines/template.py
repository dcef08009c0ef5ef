"""Copy this file to write a method, or call `robsparse new-method NAME`; see docs/new_method.md.

Without a change it is a complete but weak method: it prunes random weights of a trained network and
finetunes the others.

Source: none; replace this line by the paper (authors, venue, equation) of your method.
"""

from torch import Tensor

from robsparse.schema import Finetune, Strict
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.masks import apply_masks, random_masks
from robsparse.training.stages import Run, Stage

# The name in tables and plots.
LABEL = "Random pruning"

# The method whose trained networks this method starts from. Delete the line to train from scratch.
STARTS_FROM = "dense"


class Params(Strict):
    """Your hyperparameters with their defaults. A config can change each of them.

    Every stage has a Fit: epochs, lr, schedule, weight decay. FromScratch and Finetune are Fits
    with common defaults.

    finetune: the stage.
    """

    finetune: Finetune = Finetune()


class TemplateStage(Stage):
    """One phase of training. Override the methods that you need and delete the others."""

    name = "finetune"

    def before_fit(self, run: Run) -> None:
        """Called once before the first step: prepare run.model. Here each layer gets a mask."""
        counts = layer_keep_counts(run.model, run.sparsity)
        apply_masks(run.model, random_masks(run.model, counts, run.generator))

    def penalty(self, run: Run) -> Tensor | None:
        """Called at every step: return a term to add to the robust loss, or None."""
        return None

    def before_step(self, run: Run) -> None:
        """Called after the gradients are computed and before the optimiser changes the weights."""

    def after_step(self, run: Run) -> None:
        """Called after the optimiser has changed the weights: prune, regrow, project, ..."""


def stages(params: Params) -> list[Stage]:
    """Return the phases in order. Each phase continues with the network of the phase before."""
    return [TemplateStage(params.finetune)]
