"""Accuracy on held-out training images, by which weights are selected; never on test images."""

import torch
from torch import Tensor, nn

from robsparse import perturb
from robsparse.cells import derive_seed
from robsparse.datasets import Part
from robsparse.objectives import Attacker
from robsparse.sparsity import effective_weights


def validate(model: nn.Module, part: Part, attacker: Attacker, steps: int) -> dict[str, float]:
    """Clean and PGD accuracy in eval mode, as fractions: val_clean and val_robust.

    The random start is the same at every call, so that epochs differ in their weights alone.
    """
    generator = torch.Generator(part.x_NCHW.device).manual_seed(derive_seed("validate", len(part)))
    with perturb.batch_norm_mode(model, "eval"), effective_weights(model):
        start = perturb.uniform_start(part.x_NCHW, attacker.eps, generator)
        adversarial = perturb.ascend(
            model,
            part.x_NCHW,
            start,
            perturb.cross_entropy_of(part.y_N),
            eps=attacker.eps,
            step_size=attacker.crafting.step_size,
            steps=steps,
        )
        return {
            "val_clean": accuracy(model, part.x_NCHW, part.y_N),
            "val_robust": accuracy(model, adversarial, part.y_N),
        }


def accuracy(model: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
    """Share of images whose largest logit is that of the label."""
    with torch.no_grad():
        return int((model(x_NCHW).argmax(1) == y_N).sum()) / len(y_N)
