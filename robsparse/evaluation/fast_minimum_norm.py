"""FMN: a gradient attack that searches for the smallest perturbation of each image.

Source: Pintor et al., NeurIPS 2021, through the package foolbox (LInfFMNAttack, L2FMNAttack).
"""

import os
from typing import Any

from torch import Tensor, nn

from robsparse.compute.perturb import length

os.environ.setdefault(
    "GIT_PYTHON_REFRESH", "quiet"
)  # foolbox looks for git, which is not needed here
import foolbox


def perturbed(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    steps: int,
    max_stepsize: float = 1.0,
    gamma: float = 0.05,
    start: Tensor | None = None,
) -> Tensor:
    """Return the adversarial images of FMN for images x_NCHW in [0,1] with labels y_N.

    Args:
        model: network in eval mode, on the device of x.
        x: images.
        y: their classes.
        norm: "Linf" or "L2".
        steps: number of gradient steps.
        max_stepsize: L2 length of the first step (default of foolbox).
        gamma: share by which the allowed perturbation changes at first (default of foolbox).
        start: adversarial versions of all images, or None to start from the images.

    Returns:
        Images in [0,1] with the shape of x. An image without an adversarial version is unchanged.
    """
    kind: Any = foolbox.attacks.LInfFMNAttack if norm == "Linf" else _L2
    attack = kind(steps=steps, max_stepsize=max_stepsize, gamma=gamma)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    goal = foolbox.criteria.Misclassification(y)
    return attack.run(wrapped, x, goal, starting_points=start)


class _L2(foolbox.attacks.L2FMNAttack):
    """The L2 attack of foolbox with a corrected projection.

    The projection of foolbox 3.3.4 divides each length by itself, so it never changes anything, and
    perturbations never become shorter.
    """

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        change = x.raw - x0.raw
        lengths = length(change, "L2").clamp(min=1e-12)
        factor = (epsilon.raw / lengths).clamp(max=1)
        return type(x)(x0.raw + change * factor.view(-1, *[1] * (change.ndim - 1)))
