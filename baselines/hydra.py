"""HYDRA: train a score for each weight, keep the weights with the largest scores, then finetune.

Source: Sehwag et al., NeurIPS 2020; behaviour of inspire-group/hydra.

Differs from the authors' code (a setting in parentheses restores their behaviour):
- The learning rate follows the cosine at every step. The authors change it once in each epoch, one
  epoch later than the cosine (`schedule: cosine_epochs` in each stage).
- Batch norm updates its statistics once for each pass of the objective. The authors' code has two
  additional passes over the clean images: before crafting, and after the passes of the loss
  (`clean_passes: 2` in each stage).
- The study sets objective, eps and augmentation for all methods. The authors use TRADES with eps
  0.031, step size 0.0078 and crops (a block's `training`; see config/ap_leaderboard.yaml).
As in the authors' code, each stage starts from the last weights of the stage before.

Two switches are not part of the publication. `pattern`: the mask keeps the largest scores among the
N largest of each group of M weights, in each step. `s2ap: {gamma: 0.01}` in the prune stage: S2AP
(robsparse/training/weight_perturbation.py).
"""

from functools import partial

from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.schema import Finetune, Fit, Pattern, ScoreTraining, Strict
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.scores import Scored, scaled_scores, straight_through_mask
from robsparse.training.stages import FixedMaskStage, Run, ScoreStage, Stage, largest_weights

LABEL = "HYDRA"
STARTS_FROM = "dense"


class Prune(ScoreTraining):
    """The authors' score training: 20 epochs, lr 0.1, cosine, weight decay 1e-4."""


class Params(Strict):
    """prune: training of the scores with fixed weights. finetune: training of the kept weights."""

    prune: Prune = Prune()
    finetune: Finetune = Finetune()
    pattern: Pattern | None = Field(
        None, description="N:M sparsity, e.g. '2:4': of each M weights, at most N are nonzero"
    )


class ScoredMask(Scored):
    """Parametrisation w -> w * top_k(|score|) with a trainable score for each weight.

    The initial score is sqrt(6 / fan_in) * w / max|w|, so the first mask is the mask of LWM.
    """

    def __init__(self, weight: Tensor, k: int, pattern: str | None) -> None:
        super().__init__()
        self.k, self.pattern = k, pattern
        self.score = nn.Parameter(scaled_scores(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * straight_through_mask(self.score, self.k, self.pattern)


class PruneStage(ScoreStage):
    """Train the scores. Weights and biases are fixed; batch norm is trained."""

    name = "prune"
    # The mask changes at every step, and the authors use the last one.
    selectable = False

    def __init__(self, fit: Fit, pattern: str | None = None) -> None:
        super().__init__(fit)
        self.pattern = pattern

    def before_fit(self, run: Run) -> None:
        keep = layer_keep_counts(run.model, run.sparsity)
        for name, module in prunable(run.model).items():
            scored = ScoredMask(module.weight, keep[name], self.pattern)
            parametrize.register_parametrization(module, "weight", scored)


def stages(params: Params) -> list[Stage]:
    """Return two stages on the dense network's weights: prune, then finetune."""
    kept = partial(largest_weights, pattern=params.pattern)
    return [
        PruneStage(params.prune, params.pattern),
        FixedMaskStage("finetune", params.finetune, kept),
    ]
