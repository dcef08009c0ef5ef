"""Accuracy on held-out training images, to select weights. Test images are never used.

For a method that follows overfitting, also the loss on these images and the accuracy of the passes
of training.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.fast import folding
from robsparse.sparsity.masks import effective_weights
from robsparse.study.cells import derive_seed
from robsparse.training.objectives import Attacker

BATCH = 250  # images at a time, so that the largest networks fit into memory


def validate(
    model: nn.Module, part: Part, attacker: Attacker, steps: int, loss: bool = False
) -> dict[str, float]:
    """Return clean and PGD accuracy in eval mode, as fractions: val_clean and val_robust.

    With `loss`, also val_loss: the mean cross entropy of the images that PGD made. All calls use
    the same random start, so epochs differ only in their weights.
    """
    generator = torch.Generator(part.x_NCHW.device).manual_seed(derive_seed("validate", len(part)))
    sums = {"val_clean": 0.0, "val_robust": 0.0} | ({"val_loss": 0.0} if loss else {})
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
            sums["val_clean"] += correct_count(view, x_NCHW, y_N)
            sums["val_robust"] += correct_count(view, adversarial, y_N)
            if loss:
                with torch.no_grad():
                    sums["val_loss"] += float(F.cross_entropy(view(adversarial), y_N) * len(y_N))
    return {name: total / len(part) for name, total in sums.items()}


def correct_count(model: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> int:
    """Return the number of images with the largest logit at the label."""
    with torch.no_grad():
        return int((model(x_NCHW).argmax(1) == y_N).sum())


@contextmanager
def last_logits(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Keep the logits of the last pass inside the block in a list, without gradients, if `wanted`.

    The objectives pass the images that they train on last, and adversarial images after clean ones.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: Any, logits: Tensor) -> None:
        kept[:] = [logits.detach()]

    keep.only_reads = True  # type: ignore[attr-defined]  # images are still crafted on the view
    handle = model.register_forward_hook(keep) if wanted else None
    try:
        yield kept
    finally:
        if handle is not None:
            handle.remove()


def guessing_accuracy(part: Part) -> float:
    """Return the accuracy of a network that always predicts the largest class."""
    return int(part.y_N.bincount().max()) / len(part)
