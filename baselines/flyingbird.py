"""Flying Bird: dynamic sparse training for robust generalisation.

Source: Chen et al., "Sparsity winning twice", ICLR 2022; behaviour of the published command of
VITA-Group/Sparsity-Win-Robust-Generalization. Ideal gas quotas set the densities of the layers.
Every 900 steps (1,200 in the second half of training) each layer drops a share of its smallest
weights and grows new ones at random positions. The share falls along a cosine from 0.5 to 0.005.

Differs from the authors' code:
- The number of grown weights equals the number of dropped weights, so the budget holds at every
  step. In the authors' code it is equal only in expectation if growth is random.
- Batch norm is in eval mode while adversarial images are crafted, as for all methods (theirs:
  `crafting.bn_mode: train` in a block's `training`).
- Weights are selected by PGD on validation images, as for all methods.
"""

from robsparse.schema import FlyingBirdParams
from robsparse.training.dynamic import FlyingBirdStage
from robsparse.training.stages import Stage

LABEL = "Flying Bird"


class Params(FlyingBirdParams):
    """train: how the network is trained; the defaults are the authors'."""


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [FlyingBirdStage(params)]
