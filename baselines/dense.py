"""Adversarial training without sparsity: the reference, and the start of every pruning method."""

from pydantic import PositiveFloat, PositiveInt

from robsparse.schema import Fit, Strict
from robsparse.training.stages import Stage

LABEL = "Dense"
DENSE = True


class Pretrain(Fit):
    """HYDRA's pretraining (inspire-group/hydra: 100 epochs, lr 0.1, cosine, weight decay 1e-4)."""

    epochs: PositiveInt = 100
    lr: PositiveFloat = 0.1


class Params(Strict):
    """pretrain: how the dense network is trained."""

    pretrain: Pretrain = Pretrain()


class PretrainStage(Stage):
    """Train all weights."""

    name = "pretrain"


def stages(params: Params) -> list[Stage]:
    """One stage; `sparsity` is 0."""
    return [PretrainStage(params.pretrain)]
