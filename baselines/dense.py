"""Adversarial training without sparsity: the reference, and the start of the pruning methods."""

from pydantic import PositiveFloat, PositiveInt

from robsparse.schema import Fit, Strict
from robsparse.training.stages import Stage

LABEL = "Dense"
DENSE = True


class Pretrain(Fit):
    """Schedule of HYDRA's pretraining: 100 epochs, lr 0.1, cosine, weight decay 1e-4.

    Source: inspire-group/hydra.
    """

    epochs: PositiveInt = 100
    lr: PositiveFloat = 0.1


class Params(Strict):
    """pretrain: how the dense network is trained."""

    pretrain: Pretrain = Pretrain()


class PretrainStage(Stage):
    """Train all weights."""

    name = "pretrain"


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [PretrainStage(params.pretrain)]
