"""SET: after every epoch the smallest weights are dropped and new ones grow at random positions.

Source: Mocanu et al., Nature Communications 9 (2018), algorithm 1. At the end of an epoch each
layer drops a fraction zeta of its smallest positive weights and of its largest negative weights,
and grows the same number at random. Erdos-Renyi-Kernel, the extension of the paper's Erdos-Renyi to
convolutions (RigL, section 3), sets the densities of the layers.

Differs from the paper: new weights are 0 and have no momentum. The paper draws their values; the
authors' Keras code sets them to 0. As in the authors' code, a connection that is dropped and grown
in the same exchange counts as a new one, and there is no exchange after the last epoch.
"""

import torch
from pydantic import Field
from torch import Tensor

from robsparse.schema import FromScratch, Strict
from robsparse.training.dynamic import DynamicStage
from robsparse.training.stages import Run, Stage

LABEL = "SET"


class Params(Strict):
    """train: how the network is trained."""

    train: FromScratch = FromScratch()
    zeta: float = Field(0.3, gt=0, lt=1, description="share of each layer exchanged in each epoch")


class SetStage(DynamicStage):
    """Exchange connections in the first step of every epoch except the first epoch."""

    restarts_regrown = True

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params

    def due(self, run: Run) -> bool:
        per_epoch = run.steps // self.fit.epochs
        return run.step > 0 and run.step % per_epoch == 0

    def to_drop(self, run: Run, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the positions to drop: the smallest positive weights and largest negative ones."""
        found = []
        for sign in (1, -1):
            size = torch.where(mask & (sign * weight > 0), weight.abs(), torch.inf).flatten()
            count = int(self.params.zeta * int(size.isfinite().sum()))
            found.append(size.topk(count, largest=False).indices)
        return torch.cat(found)

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        return torch.rand(gradient.shape, generator=run.generator, device=gradient.device)


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [SetStage(params)]
