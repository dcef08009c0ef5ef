"""Least weight magnitude: prune a dense robust network once by |w| in each layer, then finetune.

Source: Han et al., NeurIPS 2015 (magnitude pruning). The robust form is that of
inspire-group/hydra: the mask keeps the top k pretrained weights of each layer; then the network is
finetuned for 100 epochs at lr 0.01 with the robust objective and this fixed mask.
"""

from robsparse.schema import Finetune, Strict
from robsparse.training.stages import FixedMaskStage, Stage

LABEL = "LWM"
STARTS_FROM = "dense"


class Params(Strict):
    """finetune: how the pruned network is trained."""

    finetune: Finetune = Finetune()


def stages(params: Params) -> list[Stage]:
    """Return one stage that finetunes the dense network under a mask."""
    return [FixedMaskStage("finetune", params.finetune)]
