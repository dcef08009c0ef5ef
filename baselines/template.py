"""Copy this file to write a method: `robsparse new-method NAME` does, docs/new_method.md explains.

As it stands it is a whole method, the weakest one that there is: it prunes random weights of a
trained network and trains the others on.

Source: none; replace this line by the paper (authors, venue, equation) that yours comes from.
"""

from torch import Tensor

from robsparse.schema import Finetune, Strict
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.masks import apply_masks, random_masks
from robsparse.training.stages import Run, Stage

# What tables and plots print.
LABEL = "Random pruning"

# Start from the weights of that method's networks. Leave the line out to train from scratch.
STARTS_FROM = "dense"


class Params(Strict):
    """Your hyperparameters with their defaults; a config may change each of them.

    Every stage has a Fit: epochs, lr, schedule, weight decay. FromScratch and Finetune are two
    with usual defaults.
    """

    finetune: Finetune = Finetune()


class TemplateStage(Stage):
    """One phase of training. Override what you need of these and delete the rest."""

    name = "finetune"

    def before_fit(self, run: Run) -> None:
        """Once, before the first step: prepare run.model, here by fixing a mask for each layer."""
        counts = layer_keep_counts(run.model, run.sparsity)
        apply_masks(run.model, random_masks(run.model, counts, run.generator))

    def penalty(self, run: Run) -> Tensor | None:
        """A term to add to the robust loss at every step, or None."""
        return None

    def before_step(self, run: Run) -> None:
        """With the gradients in place, before the optimiser moves the weights."""

    def after_step(self, run: Run) -> None:
        """After the optimiser moved them: prune, regrow, project, ..."""


def stages(params: Params) -> list[Stage]:
    """The phases, one after the other; each goes on with the network of the one before."""
    return [TemplateStage(params.finetune)]
