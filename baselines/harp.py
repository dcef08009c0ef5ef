"""HARP: learn the density of each layer and the weights to keep, then finetune.

Source: Zhao and Wressnegger, "Holistic adversarially robust pruning", ICLR 2023; behaviour of
intellisec/harp (weight pruning, mode harp_prune). Each layer keeps the share
k_min + (1 - k_min) * sigmoid(r) of its weights, those with the largest |score|. The gradient of the
share is the sum of the gradients of the layer's mask. The penalty
gamma * max(0, kept share of all weights / target density - 1) is added to the loss. gamma grows by
the same amount after each epoch until an epoch ends at the target density; then it is constant.

Differs from the authors' code (a setting in parentheses restores their behaviour):
- After the prune stage the learned shares are scaled to meet the budget exactly. The authors' code
  uses the shares at the end of training, which are at or near the target (no setting).
- The learning rate follows the cosine at every step. The authors change it at every epoch
  (`schedule: cosine_epochs`).
- Batch norm updates its statistics once for each pass of the objective. In the authors' code an
  additional pass over the clean images precedes each step (`clean_passes: 1` in each stage).
- Finetuning starts from the last scores. The authors start from the epoch with the best accuracy
  under attack on the test set, among the epochs at the target. There is no setting for this,
  because it selects by test images.
As in the authors' code, the initial scores are those of HYDRA (`score_init: random` draws them). A
later publication adds S2AP (`s2ap: {gamma: 0.01}` in the prune stage; off by default). It perturbs
the scores and not the shares.
"""

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.counts import density, keep_count, round_to_sum
from robsparse.schema import Finetune, ScoreTraining, Share, Strict
from robsparse.sparsity.layers import Prunable, parametrisation, prunable, weight_count
from robsparse.sparsity.masks import top_k_mask
from robsparse.sparsity.scores import Scored, scaled_scores
from robsparse.training.stages import FixedMaskStage, Run, ScoreStage, Stage, remaining_weights

LABEL = "HARP"
STARTS_FROM = "dense"


class Prune(ScoreTraining):
    """The authors' joint training of scores and shares: 20 epochs, lr 0.1, weight decay 5e-4."""

    weight_decay: float = Field(5e-4, ge=0)


class HarpFinetune(Finetune):
    """The authors' finetuning: 100 epochs, lr 0.01, cosine, weight decay 5e-4.

    Their code sets lr to 0.01 in every finetuning mode and ignores the value in a config file.
    """

    weight_decay: float = Field(5e-4, ge=0)


class Params(Strict):
    """Hyperparameters.

    prune: training of scores and shares.
    finetune: training of the weights that are kept.
    score_init: scores that the training starts with: scaled |w| as in HYDRA, or random.
    """

    prune: Prune = Prune()
    finetune: HarpFinetune = HarpFinetune()
    gamma: PositiveFloat = Field(0.01, description="growth of the penalty's factor in each epoch")
    alpha: Share = Field(0.1, description="a layer keeps at least alpha times the target density")
    initial_density: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="initial share of a layer, if it is above the layer's minimum",
    )
    score_init: Literal["scaled", "random"] = "scaled"


class _TopShare(torch.autograd.Function):
    """Mask of the largest scores.

    The scores get the gradient of the mask, and the share gets the sum of it.
    """

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, share: Tensor) -> Tensor:
        count = magnitude.numel() - int((1 - share.item()) * magnitude.numel())
        return top_k_mask(magnitude, max(1, count)).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum()


class RatedMask(Scored):
    """Parametrisation w -> w * mask, with trainable scores and a trainable share.

    keep: number of weights to keep; -1 if the share decides it.
    """

    def __init__(self, weight: Tensor, score: Tensor, least: float, first: float) -> None:
        super().__init__()
        self.least, self.keep = least, -1
        self.score = nn.Parameter(score)
        inner = min(max((first - least) / (1 - least), 1e-6), 0.99)
        self.rate = nn.Parameter(torch.logit(weight.new_tensor(inner)))

    def share(self) -> Tensor:
        """Return the share of the layer's weights that is kept, in [least, 1]."""
        return self.least + (1 - self.least) * torch.sigmoid(self.rate)

    def forward(self, weight: Tensor) -> Tensor:
        if self.keep >= 0:
            return weight * top_k_mask(self.score.abs(), self.keep)
        return weight * _TopShare.apply(self.score.abs(), self.share())


class PruneStage(ScoreStage):
    """Train scores and shares. Weights and biases are fixed; batch norm is trained."""

    name = "prune"
    selectable = False  # the network meets the budget only after `finalize` has scaled the shares

    def __init__(self, params: Params) -> None:
        super().__init__(params.prune)
        self.params = params
        self.gamma, self.settled = params.gamma, False

    def before_fit(self, run: Run) -> None:
        target = density(run.sparsity)
        for module in prunable(run.model).values():
            weight = module.weight.detach()
            score = scaled_scores(weight)
            if self.params.score_init == "random":
                bound = weight[0].numel() ** -0.5
                drawn = torch.rand(weight.shape, generator=run.generator, device=weight.device)
                score = bound * (2 * drawn - 1)
            least, first = self.params.alpha * target, self.params.initial_density
            mask = RatedMask(weight, score, least, first)
            parametrize.register_parametrization(module, "weight", mask)

    def before_epoch(self, run: Run) -> None:
        if run.epoch and not self.settled:
            self.settled = round(self.excess(run).item(), 4) == 0
            self.gamma = self.params.gamma * (run.epoch + (not self.settled))

    def excess(self, run: Run) -> Tensor:
        """Return by how much the density exceeds its target, relative to the target; >= 0."""
        shares = (m.weight.numel() * mask.share() for m, mask in rated(run.model))
        kept = sum(shares, torch.zeros((), device=next(run.model.parameters()).device))
        return torch.relu(kept / weight_count(run.model) / density(run.sparsity) - 1)

    def penalty(self, run: Run) -> Tensor:
        return self.gamma * self.excess(run)

    def finalize(self, run: Run) -> None:
        layers = rated(run.model)
        sizes = {str(i): module.weight.numel() for i, (module, _) in enumerate(layers)}
        budget = keep_count(weight_count(run.model), run.sparsity)
        shares = {str(i): mask.share().item() * sizes[str(i)] for i, (_, mask) in enumerate(layers)}
        spare = budget - len(layers)  # every layer keeps at least one weight
        wanted = {i: value / sum(shares.values()) * spare for i, value in shares.items()}
        counts = round_to_sum(wanted, {i: size - 1 for i, size in sizes.items()}, spare)
        for i, (_, mask) in enumerate(layers):
            mask.keep = 1 + counts[str(i)]
        super().finalize(run)

    def state(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "settled": self.settled}

    def load_state(self, state: dict[str, Any]) -> None:
        self.gamma, self.settled = state["gamma"], state["settled"]


def rated(model: nn.Module) -> list[tuple[Prunable, RatedMask]]:
    """Return each prunable layer with its mask."""
    return [(m, parametrisation(m, RatedMask)) for m in prunable(model).values()]


def stages(params: Params) -> list[Stage]:
    """Return two stages on the dense network's weights: prune, then finetune."""
    finetune = FixedMaskStage("finetune", params.finetune, remaining_weights)
    return [PruneStage(params), finetune]
