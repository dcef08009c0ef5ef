"""SET: after every epoch the weights nearest to zero give way to new ones at random positions.

Source: Mocanu et al., Nature Communications 9 (2018), algorithm 1: sparse Erdos-Renyi layers; at
the end of an epoch a fraction zeta of the smallest positive and of the largest negative weights of
each layer is removed and as many are added at random. Shares of layers by Erdos-Renyi-Kernel, its
extension to convolutions (RigL, section 3).

Differs from the paper: new weights start at 0, without momentum (the paper draws them; the authors'
Keras code starts them at 0). As in the authors' code, a connection that is removed and added in the
same exchange starts again as a new one, and after the last epoch nothing is exchanged.
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
    zeta: float = Field(0.3, gt=0, lt=1, description="share of each layer exchanged an epoch")


class SetStage(DynamicStage):
    """Exchange connections in the first step of every epoch but the first."""

    restarts_regrown = True

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params

    def due(self, run: Run) -> bool:
        per_epoch = run.steps // self.fit.epochs
        return run.step > 0 and run.step % per_epoch == 0

    def to_drop(self, run: Run, weight: Tensor, mask: Tensor) -> Tensor:
        """The share zeta of the positive weights and that of the negative ones, smallest first."""
        found = []
        for sign in (1, -1):
            size = torch.where(mask & (sign * weight > 0), weight.abs(), torch.inf).flatten()
            count = int(self.params.zeta * int(size.isfinite().sum()))
            found.append(size.topk(count, largest=False).indices)
        return torch.cat(found)

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        return torch.rand(gradient.shape, generator=run.generator, device=gradient.device)


def stages(params: Params) -> list[Stage]:
    """One stage from scratch."""
    return [SetStage(params)]
