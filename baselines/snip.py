"""SNIP: before the first step, prune the weights with the smallest effect on the loss.

Source: Lee et al., ICLR 2019, equations 4 to 6. The connection sensitivity |w * dL/dw| is computed
on one batch. One threshold for all layers gives the mask, and training continues under it. The loss
is the robust loss of the study.

Differs from the paper: the first step uses the batch that the sensitivity was computed on; the
paper draws another batch.
"""

from robsparse.base.counts import keep_count
from robsparse.schema import FromScratch, Strict
from robsparse.sparsity.layers import gradient, weight_count
from robsparse.sparsity.masks import global_masks
from robsparse.training.dynamic import MaskedStage, masked_layers, set_masks
from robsparse.training.stages import Run, Stage

LABEL = "SNIP"


class Params(Strict):
    """train: how the masked network is trained."""

    train: FromScratch = FromScratch()


class SnipStage(MaskedStage):
    """Train under the mask. Before the first gradient all weights are active; this is the peak."""

    def reads_all_gradients(self, run: Run) -> bool:
        return run.step == 0

    def before_masking(self, run: Run) -> None:
        if run.step == 0:
            scores = {
                name: (weight * gradient(weight)).detach().abs()
                for name, weight, _ in masked_layers(run.model)
            }
            keep = keep_count(weight_count(run.model), run.sparsity)
            set_masks(run, global_masks(scores, keep))


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [SnipStage(params.train)]
