"""HARP: learn how much of each layer to keep together with which weights, then finetune.

Source: Zhao and Wressnegger, "Holistic adversarially robust pruning", ICLR 2023; behaviour of
intellisec/harp (weight pruning, mode harp_prune). Each layer keeps the share
k_min + (1 - k_min) * sigmoid(r) of its weights with the largest |score|; r gets the sum of the
gradients of the layer's mask. To the loss comes gamma * max(0, kept share of all weights / target
density - 1), where gamma grows by the same amount every epoch until an epoch ends at the target,
and stays as it is from then on.

Differs from the authors' code:
- after the prune stage the learned shares are scaled to exactly the budget (theirs ends where the
  penalty has brought it, at or near the target);
- the rate follows the cosine at every step; `schedule: cosine_epochs` is theirs;
- batch norm sees each batch once a pass of the objective; theirs also sees the clean images once
  more before each step (`clean_passes: 1` in each stage);
- finetuning starts from the last scores (theirs: from the epoch with the best accuracy under attack
  on the test set among those after the target was reached; there is no switch, as it selects by
  test images).
As theirs, scores start as HYDRA's do, in the order of magnitudes (`score_init: random` draws them).
"""

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.counts import density, keep_count, round_to_sum
from robsparse.schema import Finetune, Fit, Share, Strict
from robsparse.sparsity.layers import Prunable, parametrisation, prunable, weight_count
from robsparse.sparsity.masks import top_k_mask
from robsparse.sparsity.scores import scaled_scores
from robsparse.training.stages import FixedMaskStage, Run, ScoreStage, Stage, remaining_weights

LABEL = "HARP"
STARTS_FROM = "dense"


class Prune(Fit):
    """The authors' joint training of scores and shares: 20 epochs, lr 0.1, weight decay 5e-4."""

    epochs: PositiveInt = 20
    lr: PositiveFloat = 0.1
    weight_decay: float = Field(5e-4, ge=0)


class HarpFinetune(Finetune):
    """The authors' finetuning: 100 epochs, lr 0.01, cosine, weight decay 5e-4.

    (Their configuration reader sets 0.01 in every finetuning mode, whatever a file says.)
    """

    weight_decay: float = Field(5e-4, ge=0)


class Params(Strict):
    """prune: training of scores and shares; finetune: of the weights that are kept."""

    prune: Prune = Prune()
    finetune: HarpFinetune = HarpFinetune()
    gamma: PositiveFloat = Field(0.01, description="growth of the penalty weight an epoch")
    alpha: Share = Field(0.1, description="a layer keeps at least alpha times the target density")
    initial_density: float = Field(
        0.1, gt=0, lt=1, description="share that every layer keeps at first, if above its least"
    )
    score_init: Literal["scaled", "random"] = "scaled"


class _TopShare(torch.autograd.Function):
    """Mask of the largest scores; its gradient goes to the scores, the sum of it to the share."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, share: Tensor) -> Tensor:
        count = magnitude.numel() - int((1 - share.item()) * magnitude.numel())
        return top_k_mask(magnitude, max(1, count)).to(magnitude.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum()


class RatedMask(nn.Module):
    """Parametrisation w -> w * mask, with trainable scores and a trainable share.

    keep: number of weights to keep whatever the share is, or -1.
    """

    def __init__(self, weight: Tensor, score: Tensor, least: float, first: float) -> None:
        super().__init__()
        self.least, self.keep = least, -1
        self.score = nn.Parameter(score)
        inner = min(max((first - least) / (1 - least), 1e-6), 0.99)
        self.rate = nn.Parameter(torch.logit(weight.new_tensor(inner)))

    def share(self) -> Tensor:
        """Share of the layer's weights that is kept, in [least, 1]."""
        return self.least + (1 - self.least) * torch.sigmoid(self.rate)

    def forward(self, weight: Tensor) -> Tensor:
        if self.keep >= 0:
            return weight * top_k_mask(self.score.abs(), self.keep)
        return weight * _TopShare.apply(self.score.abs(), self.share())


class PruneStage(ScoreStage):
    """Train scores and shares. Weights and biases are frozen, batch norm is not."""

    name = "prune"
    selectable = False  # the shares meet the budget only when they are scaled to it, at the end

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
        """How far the kept share of all weights is above the target density, relative to it."""
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
        spare = budget - len(layers)  # every layer keeps one weight at least
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
    """Each prunable layer with its mask."""
    return [(m, parametrisation(m, RatedMask)) for m in prunable(model).values()]


def stages(params: Params) -> list[Stage]:
    """Prune, then finetune, from the dense network's weights."""
    finetune = FixedMaskStage("finetune", params.finetune, remaining_weights)
    return [PruneStage(params), finetune]
