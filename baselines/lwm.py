"""Least weight magnitude: prune a dense robust network once by |w| in each layer, then finetune.

Source: Han et al., NeurIPS 2015 (magnitude pruning); inspire-group/hydra for the robust form that
BCS is compared with: per-layer top-k of the pretrained weights, one shot, 100 epochs of finetuning
at lr 0.01 with the robust objective and a fixed mask.
"""

from robsparse.schema import Finetune, Strict
from robsparse.training.stages import FixedMaskStage, Stage

LABEL = "LWM"
STARTS_FROM = "dense"


class Params(Strict):
    """finetune: how the pruned network is trained on."""

    finetune: Finetune = Finetune()


def stages(params: Params) -> list[Stage]:
    """One stage on the dense network's weights."""
    return [FixedMaskStage("finetune", params.finetune)]
