"""ADMM pruning: pull the weights towards their own projection, project, finetune.

Source: Ye et al., "Adversarial robustness vs. model compression, or both?", ICCV 2019; behaviour of
yeshaokai/Robustness-Aware-Pruning-ADMM, irregular sparsity.

Differs from the authors' code, and the switch that brings their behaviour back:
- every convolution and linear layer is pruned at the same rate (`layers: conv` leaves linear ones
  dense, as the list of rates in their example does; the network then misses its sparsity, and
  every table says so);
- the projection keeps exactly k weights (`projection: percentile` keeps those above the percentile
  that numpy interpolates, which may be some more or fewer);
- batch norm is in eval mode while crafting, as for all methods (`crafting.bn_mode: train`), and
  sees each batch once a pass of the objective (theirs also the clean images, once more before each
  step: `clean_passes: 1` in each stage);
- the dual variable U is a constant in the penalty, as in the paper's equation (`dual_gradient:
  authors`: their code builds U from the weights themselves at each update, so that after n updates
  the pull on W is (n + 1) rho (W - Z + U), ten times as strong at the end of their schedule);
- the learning rate falls after each third of the steps of a period (theirs at whole epochs, the 7th
  and 14th of 20), and the random start of the attack is clipped to [0,1] (theirs is not until the
  first step): no switch;
- weights are selected on held-out training images (theirs: on the test set, no switch).
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse.base.counts import layer_keep_count
from robsparse.schema import Fit, Share, Strict
from robsparse.sparsity.layers import Prunable, prunable
from robsparse.sparsity.masks import rankable, top_k_mask
from robsparse.training.stages import FixedMaskStage, Run, Stage

LABEL = "ADMM"
STARTS_FROM = "dense"


class Admm(Fit):
    """The authors' example for the penalised stage: 200 epochs, lr 0.01, weight decay 1e-4."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.01


class Retrain(Fit):
    """The authors' retraining: 200 epochs, lr 0.01, times 0.1 at epochs 80 and 150."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.01
    schedule: Literal["constant", "cosine", "step"] = "step"
    milestones: tuple[Share, ...] = (0.4, 0.75)


class Params(Strict):
    """admm: the penalised stage; retrain: the stage with the mask of the projection."""

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
        "top_k", description="what decides which weights of a layer survive"
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
        """The weights as the penalty sees them: as often in its gradient as U was built of them."""
        if self.params.dual_gradient == "textbook":
            return weight
        return weight + self.updates * (weight - weight.detach())

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """The rate restarts at each update and falls by 10 after each third of the period."""
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
    """The layers that are pruned, by name."""
    return {
        name: module
        for name, module in prunable(model).items()
        if params.layers == "all" or isinstance(module, nn.Conv2d)
    }


def survivors(weight: Tensor, sparsity: float, params: Params) -> Tensor:
    """Mask of the projection: the nearest tensor of that sparsity keeps the largest magnitudes."""
    if params.projection == "percentile":
        size = rankable(weight.detach().abs())
        return size > float(np.percentile(size.cpu().numpy(), 100 * sparsity))
    return top_k_mask(weight.abs(), layer_keep_count(weight.numel(), sparsity))


def stages(params: Params) -> list[Stage]:
    """Penalised training, then retraining, from the dense network's weights."""

    def masks(run: Run) -> dict[str, Tensor]:
        layers = pruned(run.model, params)
        return {n: survivors(m.weight, run.sparsity, params) for n, m in layers.items()}

    return [AdmmStage(params), FixedMaskStage("retrain", params.retrain, masks)]
