"""Global magnitude pruning: keep the largest weights of the whole dense network, then finetune.

Source: Han et al., NeurIPS 2015 (magnitude pruning), with one threshold for all layers as in
Frankle and Carbin, ICLR 2019, appendix I. (LWM keeps the same share of weights in every layer.)
A layer may lose all of its weights; the density plot shows this.
"""

from torch import Tensor

from robsparse.base.counts import keep_count
from robsparse.schema import Finetune, Strict
from robsparse.sparsity.layers import prunable, weight_count
from robsparse.sparsity.masks import global_masks
from robsparse.training.stages import FixedMaskStage, Run, Stage

LABEL = "Global magnitude"
STARTS_FROM = "dense"


class Params(Strict):
    """finetune: how the pruned network is trained."""

    finetune: Finetune = Finetune()


def masks(run: Run) -> dict[str, Tensor]:
    """Return masks of the largest |w| of all layers together; they meet the budget exactly."""
    sizes = {name: module.weight.detach().abs() for name, module in prunable(run.model).items()}
    return global_masks(sizes, keep_count(weight_count(run.model), run.sparsity))


def stages(params: Params) -> list[Stage]:
    """Return one stage that finetunes the dense network under a mask."""
    return [FixedMaskStage("finetune", params.finetune, masks)]
