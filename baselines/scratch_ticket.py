"""Robust scratch ticket (edge-popup): weights stay random; training selects the weights to use.

Source: Fu et al., "Drawing robust scratch tickets", NeurIPS 2021; behaviour of
GATECH-EIC/Robust-Scratch-Ticket. It is adversarial training of edge-popup (Ramanujan et al., CVPR
2020). Each layer uses its weights with the largest |score|. Scores are trained with
straight-through gradients; weights never change. (The authors abbreviate their method as "RST". The
objective `rst` is something else: robust self-training.)

Differs from the authors' code:
- The scale and shift of batch norm keep their initial values; the authors' batch norm has none.
  (`batch_norm: trained` trains them.)
- A layer uses exactly k = n - int(sparsity n) weights, as in HYDRA, computed in exact decimals. The
  authors compute the same in floats.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.schema import FromScratch, Strict
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.layers import parametrisation, prunable
from robsparse.sparsity.scores import Scored, straight_through_mask
from robsparse.training.stages import Run, ScoreStage, Stage

LABEL = "Robust scratch ticket"
OWN_START = True  # signed constants
TRAINS_WEIGHTS = False


class Train(FromScratch):
    """The authors' schedule: 160 epochs, lr 0.1, drops at 80 and 120, weight decay 5e-4."""

    epochs: PositiveInt = 160
    lr: PositiveFloat = 0.1


class Params(Strict):
    """train: training of the scores."""

    train: Train = Train()
    weights: Literal["signed_constant", "initial"] = Field(
        "signed_constant",
        description="the random weights: signs of the initial weights times sqrt(2 / fan_in), or "
        "the initial weights",
    )
    batch_norm: Literal["fixed", "trained"] = Field(
        "fixed", description="whether gamma and beta of batch norm are trained"
    )


class PopupMask(Scored):
    """Parametrisation w -> w * top_k(|score|) with trained scores.

    Initial scores are uniform in +-1/sqrt(fan_in).
    """

    def __init__(self, weight: Tensor, k: int, generator: torch.Generator) -> None:
        super().__init__()
        self.k = k
        bound = weight[0].numel() ** -0.5
        drawn = torch.rand(weight.shape, generator=generator, device=weight.device)
        self.score = nn.Parameter(bound * (2 * drawn - 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * straight_through_mask(self.score, self.k)


class PopupStage(ScoreStage):
    """Train the scores. The network meets its sparsity in every epoch."""

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params

    def before_fit(self, run: Run) -> None:
        keep = layer_keep_counts(run.model, run.sparsity)
        for name, module in prunable(run.model).items():
            weight = module.weight.data
            if self.params.weights == "signed_constant":
                weight.copy_(torch.where(weight < 0, -1.0, 1.0) * (2 / weight[0].numel()) ** 0.5)
            popup = PopupMask(weight, keep[name], run.generator)
            parametrize.register_parametrization(module, "weight", popup)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        if self.params.batch_norm == "trained":
            return super().parameters(model)
        return [parametrisation(m, PopupMask).score for m in prunable(model).values()]


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains scores on random weights."""
    return [PopupStage(params)]
