"""Accuracy on held-out training images, to select weights. Test images are never used."""

import torch
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.fast import folding
from robsparse.sparsity.masks import effective_weights
from robsparse.study.cells import derive_seed
from robsparse.training.objectives import Attacker

BATCH = 250  # images at a time, so that the largest networks fit into memory


def validate(model: nn.Module, part: Part, attacker: Attacker, steps: int) -> dict[str, float]:
    """Return clean and PGD accuracy in eval mode, as fractions: val_clean and val_robust.

    All calls use the same random start, so epochs differ only in their weights.
    """
    generator = torch.Generator(part.x_NCHW.device).manual_seed(derive_seed("validate", len(part)))
    correct = {"val_clean": 0, "val_robust": 0}
    with perturb.batch_norm_mode(model, "eval"), effective_weights(model):
        view = folding.folded_view(model, part.x_NCHW)
        batches = zip(part.x_NCHW.split(BATCH), part.y_N.split(BATCH), strict=True)
        for x_NCHW, y_N in batches:
            start = perturb.uniform_start(x_NCHW, attacker.eps, generator, attacker.norm)
            adversarial = perturb.ascend(
                view,
                x_NCHW,
                start,
                perturb.cross_entropy_of(y_N),
                eps=attacker.eps,
                step_size=attacker.crafting.step_size,
                steps=steps,
                norm=attacker.norm,
            )
            correct["val_clean"] += correct_count(view, x_NCHW, y_N)
            correct["val_robust"] += correct_count(view, adversarial, y_N)
    return {name: count / len(part) for name, count in correct.items()}


def correct_count(model: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> int:
    """Return the number of images with the largest logit at the label."""
    with torch.no_grad():
        return int((model(x_NCHW).argmax(1) == y_N).sum())


def guessing_accuracy(part: Part) -> float:
    """Return the accuracy of a network that always predicts the largest class."""
    return int(part.y_N.bincount().max()) / len(part)
