"""Flying Bird+: Flying Bird that also adapts its sparsity to overfitting.

Source: Chen et al., "Sparsity winning twice", ICLR 2022; behaviour of the published command of
VITA-Group/Sparsity-Win-Robust-Generalization. The network starts at the requested sparsity and
exchanges connections as Flying Bird does. From epoch 100 of 200 on, an exchange also looks at the
last five epochs:
- if the gap between robust accuracy in training and in validation rose in at least half of the four
  changes, each layer drops more weights: the share of the exchange times 0.4;
- if the loss on validation images under attack did not fall in at least half of them, each layer
  grows 5 % more weights.
Layers without a masked weight are left as they are. So the network ends at another sparsity, and
every table prints the sparsity that it reached.

Differs from the authors' code (see Flying Bird for the differences that both have):
- The released code reads an option `dynamic_sparse` that its command line does not define. Here the
  method behaves as if it was on.
- Random growth adds an exact number of weights, rounded down as in their growth by gradient. Theirs
  draws each position, so that the number is right in expectation.
- The accuracy in training is that of the last pass of the objective: adversarial images, for
  `mat` also clean ones, for `natural` only clean ones. The authors use only `at`.
- With `validation.every` above 1, the last five validations are compared.
"""

import itertools
import math
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from robsparse.schema import FlyingBirdParams, Share
from robsparse.training.dynamic import FlyingBirdStage
from robsparse.training.stages import Run, Stage

LABEL = "Flying Bird+"
ADAPTS_SPARSITY = True


class Params(FlyingBirdParams):
    """train: how the network is trained; all defaults are the authors'."""

    adapt_from: Share = Field(
        0.5, description="share of the epochs after which the sparsity may change"
    )
    compared: PositiveInt = Field(4, description="number of changes between epochs that count")
    threshold: float = Field(
        0.5, gt=0, le=1, description="share of these changes that must point to overfitting"
    )
    prune_ratio: PositiveFloat = Field(
        0.4, description="further dropped weights, as a share of those of the exchange"
    )
    growth_ratio: PositiveFloat = Field(
        0.05, description="further grown weights, as a share of those of the exchange"
    )


class FlyingBirdPlusStage(FlyingBirdStage):
    """Train; exchange connections after some steps, and drop or grow more while overfitting."""

    follows_overfitting = True
    params: Params

    def dropped_count(self, run: Run, mask: Tensor) -> int:
        if mask.all():
            return 0
        active, count = int(mask.sum()), super().dropped_count(run, mask)
        if self.gap_rises(run):
            count += math.ceil(self.fraction(run) * self.params.prune_ratio * active)
        return min(count, active)

    def grown_count(self, run: Run, mask: Tensor, dropped: int) -> int:
        if mask.all():
            return 0
        count = super().dropped_count(run, mask)
        if self.loss_rises(run):
            count = int(count * (1 + self.params.growth_ratio))
        return min(count, int((~mask).sum()) + dropped)

    def gap_rises(self, run: Run) -> bool:
        """Return whether training gains more robust accuracy than validation does."""
        gaps = [point["train_accuracy"] - point["val_robust"] for point in self._last(run)]
        return self._often(run, [after > before for before, after in itertools.pairwise(gaps)])

    def loss_rises(self, run: Run) -> bool:
        """Return whether the validation loss under attack has stopped falling."""
        losses = [point["val_loss"] for point in self._last(run)]
        return self._often(run, [after >= before for before, after in itertools.pairwise(losses)])

    def _last(self, run: Run) -> list[dict[str, Any]]:
        """Return the points of the curve that are compared."""
        return [point for point in run.curve if "val_loss" in point][-self.params.compared - 1 :]

    def _often(self, run: Run, signs: list[bool]) -> bool:
        """Return whether the sparsity may change and enough changes are signs of overfitting."""
        late = run.epoch >= self.params.adapt_from * self.fit.epochs
        return late and bool(signs) and sum(signs) >= self.params.threshold * len(signs)


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [FlyingBirdPlusStage(params)]
