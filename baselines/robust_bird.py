"""Robust Bird: train the dense network until its mask is stable, prune it, and train the ticket.

Source: Chen et al., "Sparsity winning twice", ICLR 2022; behaviour of
VITA-Group/Sparsity-Win-Robust-Generalization (Robust-Bird, unstructured). After every epoch of
dense training the mask of the largest |w| of the whole network is computed. The mask is stable if
it differs from each of the four masks before it in at most the share `distance` of its entries.
Then the network is pruned by this mask. Training continues from its current weights with a new
optimiser, and the schedule of the learning rate starts again.

Differs from the authors' code (a setting in parentheses restores their behaviour):
- Both phases share the epochs of the stage, so that a run has a fixed cost. The second phase and
  its schedule use the epochs that the first phase leaves. In the authors' code the second phase has
  its own number of epochs (no setting).
- If no mask is stable before the share `latest` of the epochs, the network is pruned at that point.
  In the authors' code this happens after the last of 200 epochs (no setting).
- All convolutions and linear layers are pruned. In the authors' code linear layers stay dense
  (`layers: conv`). The network then misses its sparsity, and every table says so.
- The first phase trains with the objective of the study. The authors can also train it on clean
  images (no setting).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robsparse.base.counts import keep_count
from robsparse.schema import FromScratch, Share, Strict
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.masks import global_masks
from robsparse.training.dynamic import MaskedStage, masked_layers, set_masks
from robsparse.training.stages import Run, Stage, schedule_factor

LABEL = "Robust Bird"
COMPARED = 5  # number of masks that are compared, with the last one


class Train(FromScratch):
    """The authors' schedule: lr 0.1, drops after 50 and 150 of 200 epochs, weight decay 5e-4."""

    milestones: tuple[Share, ...] = (0.25, 0.75)


class Params(Strict):
    """train: training in both phases together."""

    train: Train = Train()
    distance: Share = Field(
        0.08, description="largest share of entries in which stable masks differ"
    )
    latest: float = Field(
        0.5, gt=0, lt=1, description="longest first phase, as a share of all epochs"
    )
    layers: Literal["all", "conv"] = Field("all", description="which layers are pruned")


class BirdStage(MaskedStage):
    """Both phases. An epoch can be selected after the network has been pruned."""

    selectable = False

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params
        self.drawn_at = -1  # first epoch of the second phase
        self.masks: list[Tensor] = []

    def before_epoch(self, run: Run) -> None:
        if self.selectable or run.epoch == 0:
            return
        ticket = self.ticket(run)
        flat = torch.cat([mask.flatten() for mask in ticket.values()])
        self.masks = [*self.masks, flat][-COMPARED:]
        if self.settled() or run.epoch >= self.params.latest * self.fit.epochs:
            whole = self.initial_masks(run)
            set_masks(run, whole | ticket)
            run.optimizer.state.clear()  # drop the momentum of the first phase
            self.drawn_at, self.selectable, self.masks = run.epoch, True, []

    def ticket(self, run: Run) -> dict[str, Tensor]:
        """Return the mask of the largest |w| of all layers that are pruned."""
        conv_only = self.params.layers == "conv"
        sizes = {
            name: weight.detach().abs()
            for (name, weight, _), module in zip(
                masked_layers(run.model), prunable(run.model).values(), strict=True
            )
            if not conv_only or isinstance(module, nn.Conv2d)
        }
        total = sum(size.numel() for size in sizes.values())
        return global_masks(sizes, keep_count(total, run.sparsity))

    def settled(self) -> bool:
        """Return whether the last mask is stable: it is similar to each of the masks before it."""
        *before, last = self.masks
        apart = [float((last != mask).float().mean()) for mask in before]
        return len(apart) == COMPARED - 1 and max(apart) <= self.params.distance

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor on the lr by the schedule of the current phase.

        The schedule of the first phase covers all epochs of the stage. The schedule of the second
        phase covers the epochs that are left.
        """
        if self.drawn_at < 0:
            return schedule_factor(self.fit, step, steps_per_epoch)
        left = self.fit.model_copy(update={"epochs": self.fit.epochs - self.drawn_at, "warmup": 0})
        return schedule_factor(left, step - self.drawn_at * steps_per_epoch, steps_per_epoch)

    def state(self) -> dict[str, Any]:
        return {"drawn_at": self.drawn_at, "masks": self.masks}

    def load_state(self, state: dict[str, Any]) -> None:
        self.drawn_at, self.masks = state["drawn_at"], state["masks"]
        self.selectable = self.drawn_at >= 0


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [BirdStage(params)]
