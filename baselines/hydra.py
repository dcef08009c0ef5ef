"""HYDRA: learn which weights to keep by gradient descent on a score for each, then finetune.

Source: Sehwag et al., NeurIPS 2020; behaviour of inspire-group/hydra.

Differs from the authors' code:
- the learning rate follows the cosine at every step, not once an epoch with an offset of one;
- batch-norm statistics see each batch once a pass of the objective, not also a pass for logging;
- the objective, eps and augmentation are those of the study, the same for all methods.
"""

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.config import Fit, Strict
from robsparse.sparsity import layer_keep_counts, prunable, top_k_mask, weight_count
from robsparse.stages import FixedMaskStage, Run, Stage

LABEL = "HYDRA"
STARTS_FROM = "dense"


class Prune(Fit):
    """The authors' score training: 20 epochs, lr 0.1, cosine, weight decay 1e-4."""

    epochs: PositiveInt = 20
    lr: PositiveFloat = 0.1


class Finetune(Fit):
    """The authors' finetuning: 100 epochs, lr 0.01, cosine, weight decay 1e-4."""

    epochs: PositiveInt = 100
    lr: PositiveFloat = 0.01


class Params(Strict):
    """prune: training of the scores on frozen weights; finetune: of the weights that are kept."""

    prune: Prune = Prune()
    finetune: Finetune = Finetune()


class _StraightThroughTopK(torch.autograd.Function):
    """0/1 mask of the k largest |scores|; its gradient is handed to |score| unchanged."""

    @staticmethod
    def forward(ctx, magnitude: Tensor, k: int) -> Tensor:
        return top_k_mask(magnitude, k).to(magnitude.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ScoredMask(nn.Module):
    """Parametrisation w -> w * top_k(|score|) with a trainable score for each weight.

    The score starts at sqrt(6 / fan_in) * w / max|w|, so the first mask is that of LWM.
    """

    def __init__(self, weight: Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        fan_in = weight[0].numel()
        scaled = (6 / fan_in) ** 0.5 * weight.detach() / weight.detach().abs().max()
        self.score = nn.Parameter(scaled.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _StraightThroughTopK.apply(self.score.abs(), self.k)


class PruneStage(Stage):
    """Train the scores. Weights and biases are frozen, batch norm is not."""

    name = "prune"
    # The mask moves at every step, and the authors hand over the last one.
    selectable = False

    def before_fit(self, run: Run) -> None:
        keep = layer_keep_counts(run.model, run.sparsity)
        for name, module in prunable(run.model).items():
            scored = ScoredMask(module.weight, keep[name])
            parametrize.register_parametrization(module, "weight", scored)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        frozen = set()
        for module in prunable(model).values():
            frozen |= {id(module.parametrizations.weight.original), id(module.bias)}
        return [p for p in model.parameters() if id(p) not in frozen]

    def live_weights(self, run: Run) -> int:
        # Every weight has a score that gets a gradient: the dense network is still there.
        return weight_count(run.model)


def stages(params: Params, sparsity: float) -> list[Stage]:
    """Prune, then finetune, from the dense network's weights."""
    return [PruneStage(params.prune), FixedMaskStage("finetune", params.finetune)]
