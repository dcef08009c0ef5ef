"""ADMM pruning: pull the weights towards their own projection, project, finetune.

Source: Ye et al., "Adversarial robustness vs. model compression, or both?", ICCV 2019; behaviour of
yeshaokai/Robustness-Aware-Pruning-ADMM, irregular sparsity.

Differs from the authors' code (a setting in parentheses restores their behaviour):
- All convolutions and linear layers are pruned at the same rate. In the authors' example linear
  layers stay dense (`layers: conv`). The network then misses its sparsity, and every table says so.
- The projection keeps exactly k weights. The authors keep the weights above a percentile that
  numpy interpolates, which may be more or fewer than k (`projection: percentile`).
- Batch norm is in eval mode while adversarial images are crafted, as for all methods
  (`crafting.bn_mode: train`).
- Batch norm updates its statistics once for each pass of the objective. In the authors' code an
  additional pass over the clean images precedes each step (`clean_passes: 1` in each stage).
- The dual variable U is a constant in the penalty, as in the paper's equation. The authors' code
  computes U from the weights at each update and differentiates through it. After n updates the
  gradient of the penalty is (n + 1) rho (W - Z + U), which is ten times as large at the end of
  their schedule (`dual_gradient: authors`).
- The learning rate falls after each third of the steps of a period. In the authors' code it falls
  after whole epochs: the 7th and 14th of 20 (no setting).
- The random start of the attack is clipped to [0,1]. The authors do not clip it before the first
  step (no setting).
- Weights are selected on validation images. The authors select on the test set (no setting).
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse.base.counts import layer_keep_count
from robsparse.schema import Fit, Share, Strict
from robsparse.sparsity.layers import Prunable, prunable
from robsparse.sparsity.masks import require_finite, top_k_mask
from robsparse.training.stages import FixedMaskStage, Run, Stage

LABEL = "ADMM"
STARTS_FROM = "dense"


class Admm(Fit):
    """The authors' example for the stage with the penalty: 200 epochs, lr 0.01, decay 1e-4."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.01


class Retrain(Fit):
    """The authors' retraining: 200 epochs, lr 0.01, times 0.1 at epochs 80 and 150."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.01
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Share, ...] = (0.4, 0.75)


class Params(Strict):
    """admm: the stage with the penalty. retrain: the stage with the fixed mask."""

    admm: Admm = Admm()
    retrain: Retrain = Retrain()
    rho: PositiveFloat = Field(1e-3, description="initial weight of the penalty")
    rho_growth: float = Field(1.3, ge=1, description="factor on rho at each update")
    update_every: PositiveInt = Field(20, description="epochs between updates of Z and U")
    dual_gradient: Literal["textbook", "authors"] = Field(
        "textbook", description="whether U is a constant in the penalty or built from the weights"
    )
    layers: Literal["all", "conv"] = Field("all", description="which layers are pruned")
    projection: Literal["top_k", "percentile"] = Field(
        "top_k", description="how the weights that a layer keeps are chosen"
    )


class AdmmStage(Stage):
    """Train all weights with the penalty rho/2 * ||W - Z + U||^2 of each layer.

    Z starts as the projection of W and U as 0. Every `update_every` epochs: Z = project(W + U),
    U = U + W - Z, rho = rho * rho_growth, and the learning rate starts again.
    """

    name = "admm"
    selectable = False

    def __init__(self, params: Params) -> None:
        super().__init__(params.admm)
        self.params = params
        self.rho, self.updates = params.rho, 0
        self.Z: dict[str, Tensor] = {}
        self.U: dict[str, Tensor] = {}

    def before_fit(self, run: Run) -> None:
        for name, module in pruned(run.model, self.params).items():
            weight = module.weight.detach()
            self.Z[name] = weight * survivors(weight, run.sparsity, self.params)
            self.U[name] = weight.new_zeros(weight.shape)

    def before_epoch(self, run: Run) -> None:
        if run.epoch == 0 or run.epoch % self.params.update_every:
            return
        for name, module in pruned(run.model, self.params).items():
            weight = module.weight.detach()
            target = weight + self.U[name]
            self.Z[name] = target * survivors(target, run.sparsity, self.params)
            self.U[name] = self.U[name] + weight - self.Z[name]
        self.rho *= self.params.rho_growth
        self.updates += 1

    def penalty(self, run: Run) -> Tensor:
        gaps = (
            (self._differentiated(module.weight) - self.Z[name] + self.U[name]).square().sum()
            for name, module in pruned(run.model, self.params).items()
        )
        zero = torch.zeros((), device=next(run.model.parameters()).device)
        return 0.5 * self.rho * sum(gaps, zero)

    def _differentiated(self, weight: Tensor) -> Tensor:
        """Return the weights; their gradient is scaled if `dual_gradient` is "authors"."""
        if self.params.dual_gradient == "textbook":
            return weight
        return weight + self.updates * (weight - weight.detach())

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the factor on the lr. It starts again at 1 after each update of Z and U.

        It falls by a factor of 10 after each third of the period between updates.
        """
        period = self.params.update_every * steps_per_epoch
        return 0.1 ** (3 * (step % period) // period)

    def state(self) -> dict[str, Any]:
        return {"rho": self.rho, "updates": self.updates, "Z": self.Z, "U": self.U}

    def load_state(self, state: dict[str, Any]) -> None:
        self.rho, self.updates = state["rho"], state["updates"]
        for mine, saved in ((self.Z, state["Z"]), (self.U, state["U"])):
            for name, value in saved.items():
                mine[name] = value.to(mine[name].device)


def pruned(model: nn.Module, params: Params) -> dict[str, Prunable]:
    """Return the layers that are pruned, by name."""
    return {
        name: module
        for name, module in prunable(model).items()
        if params.layers == "all" or isinstance(module, nn.Conv2d)
    }


def survivors(weight: Tensor, sparsity: float, params: Params) -> Tensor:
    """Return the mask of the projection onto tensors of a sparsity: the largest magnitudes."""
    if params.projection == "percentile":
        size = require_finite(weight.detach().abs())
        return size > float(np.percentile(size.cpu().numpy(), 100 * sparsity))
    return top_k_mask(weight.abs(), layer_keep_count(weight.numel(), sparsity))


def stages(params: Params) -> list[Stage]:
    """Return two stages on the dense network's weights: train with the penalty, then retrain."""

    def masks(run: Run) -> dict[str, Tensor]:
        layers = pruned(run.model, params)
        return {n: survivors(m.weight, run.sparsity, params) for n, m in layers.items()}

    return [AdmmStage(params), FixedMaskStage("retrain", params.retrain, masks)]
