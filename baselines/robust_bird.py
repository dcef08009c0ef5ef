"""Robust Bird: train densely until the ticket has settled, prune, train the ticket.

Source: Chen et al., "Sparsity winning twice", ICLR 2022; behaviour of
VITA-Group/Sparsity-Win-Robust-Generalization (Robust-Bird, unstructured). After every epoch of
dense training the mask of the largest |w| of the whole network is drawn. Once the last mask differs
from each of the four before it in at most `distance` of its entries, the network is pruned by it
and trains on from its present weights, with a new optimiser and the learning rate's schedule from
its start.

Differs from the authors' code, and the switch that brings their behaviour back:
- both phases share the epochs of the stage, so that a run costs what was asked: the second phase
  takes what the first has left, and its schedule is that long (theirs has epochs of its own);
- a ticket that has not settled by the share `latest` of the epochs is drawn then (theirs: after the
  last of 200 epochs);
- every convolution and linear layer is pruned (`layers: conv` leaves linear ones dense, as theirs;
  the network then misses its sparsity, and every table says so);
- the first phase trains with the objective of the study (theirs can also train it on clean images).
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
COMPARED = 5  # masks of as many epochs, the last one included


class Train(FromScratch):
    """The authors' schedule: lr 0.1, drops after 50 and 150 of 200 epochs, weight decay 5e-4."""

    milestones: tuple[Share, ...] = (0.25, 0.75)


class Params(Strict):
    """train: both phases together."""

    train: Train = Train()
    distance: Share = Field(0.08, description="largest share of a mask's entries that still differ")
    latest: float = Field(0.5, gt=0, lt=1, description="share of the epochs of the first phase")
    layers: Literal["all", "conv"] = Field("all", description="which layers are pruned")


class BirdStage(MaskedStage):
    """Both phases. An epoch can be selected once the ticket has been drawn."""

    selectable = False

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params
        self.drawn_at = -1  # the epoch that the second phase starts with
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
            run.optimizer.state.clear()  # the momentum of the first phase
            self.drawn_at, self.selectable, self.masks = run.epoch, True, []

    def ticket(self, run: Run) -> dict[str, Tensor]:
        """The mask of the largest |w| of all layers that are pruned."""
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
        """Whether the last mask is near enough to each of those before it."""
        *before, last = self.masks
        apart = [float((last != mask).float().mean()) for mask in before]
        return len(apart) == COMPARED - 1 and max(apart) <= self.params.distance

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """The schedule of the stage as if it lasted as long as it was meant to, then again."""
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
    """One stage from scratch."""
    return [BirdStage(params)]
