"""HYDRA: learn which weights to keep by gradient descent on a score for each, then finetune.

Source: Sehwag et al., NeurIPS 2020; behaviour of inspire-group/hydra.

Differs from the authors' code, and what brings their behaviour back:
- the learning rate follows the cosine at every step, not once an epoch and an epoch late
  (`schedule: cosine_epochs` in each stage);
- batch norm sees each batch once a pass of the objective; theirs also sees the clean images once
  before crafting and once after the passes of the loss (`clean_passes: 2` in each stage);
- the objective, eps and augmentation are those of the study, the same for all methods. Theirs are
  TRADES with eps 0.031, step 0.0078, and crops: a block's `training` sets them
  (config/ap_leaderboard.yaml).
Kept as theirs: the last weights of a phase are handed to the next one.
"""

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.schema import Finetune, Fit, Strict
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.scores import scaled_scores, straight_through_mask
from robsparse.training.stages import FixedMaskStage, Run, ScoreStage, Stage

LABEL = "HYDRA"
STARTS_FROM = "dense"


class Prune(Fit):
    """The authors' score training: 20 epochs, lr 0.1, cosine, weight decay 1e-4."""

    epochs: PositiveInt = 20
    lr: PositiveFloat = 0.1


class Params(Strict):
    """prune: training of the scores on frozen weights; finetune: of the weights that are kept."""

    prune: Prune = Prune()
    finetune: Finetune = Finetune()


class ScoredMask(nn.Module):
    """Parametrisation w -> w * top_k(|score|) with a trainable score for each weight.

    The score starts at sqrt(6 / fan_in) * w / max|w|, so the first mask is that of LWM.
    """

    def __init__(self, weight: Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        self.score = nn.Parameter(scaled_scores(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * straight_through_mask(self.score, self.k)


class PruneStage(ScoreStage):
    """Train the scores. Weights and biases are frozen, batch norm is not."""

    name = "prune"
    # The mask moves at every step, and the authors hand over the last one.
    selectable = False

    def before_fit(self, run: Run) -> None:
        keep = layer_keep_counts(run.model, run.sparsity)
        for name, module in prunable(run.model).items():
            scored = ScoredMask(module.weight, keep[name])
            parametrize.register_parametrization(module, "weight", scored)


def stages(params: Params) -> list[Stage]:
    """Prune, then finetune, from the dense network's weights."""
    return [PruneStage(params.prune), FixedMaskStage("finetune", params.finetune)]
