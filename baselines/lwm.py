"""Least weight magnitude: prune a dense robust network once by |w| in each layer, then finetune.

Source: Han et al., NeurIPS 2015 (magnitude pruning). The robust form is that of
inspire-group/hydra: the mask keeps the top k pretrained weights of each layer; then the network is
finetuned for 100 epochs at lr 0.01 with the robust objective and this fixed mask. With `pattern`,
each group keeps its N largest weights at most (Mishra et al., 2021: 2:4 of a pretrained network).
"""

from functools import partial

from pydantic import Field

from robsparse.schema import Finetune, Pattern, Strict
from robsparse.training.stages import FixedMaskStage, Stage, largest_weights

LABEL = "LWM"
STARTS_FROM = "dense"


class Params(Strict):
    """finetune: how the pruned network is trained."""

    finetune: Finetune = Finetune()
    pattern: Pattern | None = Field(
        None, description="N:M sparsity, e.g. '2:4': of each M weights, at most N are nonzero"
    )


def stages(params: Params) -> list[Stage]:
    """Return one stage that finetunes the dense network under a mask."""
    masks = partial(largest_weights, pattern=params.pattern)
    return [FixedMaskStage("finetune", params.finetune, masks)]
