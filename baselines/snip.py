"""SNIP: before the first step keep the weights whose removal would change the loss the most.

Source: Lee et al., ICLR 2019, equations 4 to 6: connection sensitivity |w * dL/dw| on one batch,
one threshold for all layers, then ordinary training under that mask. The loss is the robust one of
the study.

Differs from the paper: the batch that scores also takes the first step, one more is not drawn.
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
    """Dense until the first gradient is known: that is the peak of live weights."""

    def before_masking(self, run: Run) -> None:
        if run.step == 0:
            scores = {
                name: (weight * gradient(weight)).detach().abs()
                for name, weight, _ in masked_layers(run.model)
            }
            keep = keep_count(weight_count(run.model), run.sparsity)
            set_masks(run, global_masks(scores, keep))


def stages(params: Params) -> list[Stage]:
    """One stage from scratch."""
    return [SnipStage(params.train)]
