"""TwinRep: each weight is a product of two trained factors; the network is pruned once, early.

Source: Li et al., "Learning adversarially robust sparse networks via weight reparameterization",
AAAI 2023; behaviour of UCAS-LCH/Twin-Rep, unstructured. The effective weights are w * a. The
initial `a` is uniform in +-1 / sqrt(fan_in), like the weights of a linear layer. Before the epoch
`prune_at` the smallest |w * a| of the whole network are set to zero permanently; the rest meets the
budget exactly. Then the factors of the other weights are trained. The exported weights are the
products.

Differs from the authors' code (a setting in parentheses restores their behaviour):
- The study sets objective, eps and augmentation. The authors use TRADES with eps 0.031 and step
  size 0.0078 (a block's `training`).
- Images are not normalised. The authors normalise them inside the network (`mean` and `std` of a
  variant of the architecture).
"""

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.counts import keep_count
from robsparse.schema import FromScratch, Share, Strict
from robsparse.sparsity.layers import parametrisation, prunable, weight_count
from robsparse.sparsity.masks import global_masks
from robsparse.training.stages import Run, Stage

LABEL = "TwinRep"
OWN_START = True  # initial weights are products of two factors


class Train(FromScratch):
    """The authors' schedule: 100 epochs, lr 0.1, drops at 70 and 85 %, weight decay 2e-4."""

    epochs: PositiveInt = 100
    lr: PositiveFloat = 0.1
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Share, ...] = (0.7, 0.85)
    weight_decay: float = Field(2e-4, ge=0)


class Params(Strict):
    """train: how the network is trained."""

    train: Train = Train()
    prune_at: float = Field(
        0.09, gt=0, lt=1, description="share of the epochs before pruning (9 of 100)"
    )


class TwinMask(nn.Module):
    """Parametrisation w -> w * a * mask with a trained factor `a`."""

    mask: Tensor

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        bound = weight[0].numel() ** -0.5
        drawn = torch.rand(weight.shape, generator=generator, device=weight.device)
        self.factor = nn.Parameter(bound * (2 * drawn - 1))
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor * self.mask


class TwinStage(Stage):
    """Train both factors. An epoch can be selected after the network has been pruned."""

    selectable = False

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.dense_epochs = max(1, round(params.prune_at * params.train.epochs))

    def before_fit(self, run: Run) -> None:
        for module in prunable(run.model).values():
            twin = TwinMask(module.weight.detach(), run.generator)
            parametrize.register_parametrization(module, "weight", twin)

    def before_epoch(self, run: Run) -> None:
        last_chance = run.epoch + 1 == self.fit.epochs
        if self.selectable or (run.epoch < self.dense_epochs and not last_chance):
            return
        sizes = {name: m.weight.detach().abs() for name, m in prunable(run.model).items()}
        masks = global_masks(sizes, keep_count(weight_count(run.model), run.sparsity))
        for name, module in prunable(run.model).items():
            parametrisation(module, TwinMask).mask.copy_(masks[name])
        self.selectable = True

    def active_weights(self, run: Run) -> int:
        return sum(
            int(parametrisation(m, TwinMask).mask.sum()) for m in prunable(run.model).values()
        )

    def state(self) -> dict[str, Any]:
        return {"selectable": self.selectable}

    def load_state(self, state: dict[str, Any]) -> None:
        self.selectable = state["selectable"]


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [TwinStage(params)]
