"""Adversarial weight perturbation (AWP): a step lowers the loss at the worst weights nearby.

Source: Wu et al., NeurIPS 2020, and their code, csdongxian/AWP. After the images are crafted, each
convolution and linear weight w moves by gamma ||w|| g / ||g||, where g is the gradient of the loss
on these images. The step takes the gradients there, and then w is restored. The statistics of
batch norm see the passes of the step and not those that compute g.

Differs from the authors' code:
- Only active connections move, and ||w|| is their norm. The authors train dense networks.
- w is restored before the step of the optimiser and not after it. So weight decay acts on w, and
  not on the perturbed weight.
- All objectives have it, with their own loss; the authors' code has it for AT, TRADES and others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.sparsity.layers import prunable
from robsparse.training.objectives import Attacker, Objective, RandomStart

SMALLEST_NORM = 1e-20  # as in the authors' code; it is added to the norm of g


@dataclass(frozen=True)
class CraftedOnce(Attacker):
    """An attacker that crafts at its first call, and returns the same images at later calls.

    statistics: the buffers of batch norm as they were after the crafting.
    """

    images: list[Tensor] = field(default_factory=list, compare=False)
    statistics: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    @classmethod
    def from_attacker(cls, attacker: Attacker, model: nn.Module) -> "CraftedOnce":
        """Return such an attacker with the settings and random numbers of another one."""
        made = cls(**{f.name: getattr(attacker, f.name) for f in fields(attacker)})
        made.statistics[:] = _statistics(model)
        return made

    def attack_labels(
        self, model: nn.Module, x: Tensor, y: Tensor, start: RandomStart = perturb.uniform_start
    ) -> Tensor:
        """As `Attacker.attack_labels`, once."""
        if not self.images:
            self._keep(model, Attacker.attack_labels(self, model, x, y, start))
        return self.images[0]

    def attack_outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """As `Attacker.attack_outputs`, once."""
        if not self.images:
            self._keep(model, Attacker.attack_outputs(self, model, x))
        return self.images[0]

    def _keep(self, model: nn.Module, images: Tensor) -> None:
        self.images.append(images)
        self.statistics[:] = _statistics(model)


def _statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the buffers of all batch norms, each with a copy of its values."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    found = [getattr(module, name, None) for module in model.modules() for name in names]
    return [(buffer, buffer.clone()) for buffer in found if isinstance(buffer, Tensor)]


@contextmanager
def perturbed_weights(
    model: nn.Module,
    objective: Objective,
    attacker: Attacker,
    batch: tuple[Tensor, Tensor],
    gamma: float,
) -> Iterator[Attacker]:
    """Perturb the weights inside the block, against the loss of the batch.

    The model has formed its effective weights. The block gets an attacker that returns the images
    for which the weights were perturbed. A gamma of 0 changes nothing.
    """
    if not gamma:
        yield attacker
        return
    once = CraftedOnce.from_attacker(attacker, model)
    weights = [m.weight for m in prunable(model).values() if m.weight.requires_grad]
    gradients = torch.autograd.grad(objective(model, *batch, once), weights, allow_unused=True)
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for buffer, value in once.statistics:
            buffer.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                direction = gradient * (weight != 0)
                length = gamma * weight.norm() / (direction.norm() + SMALLEST_NORM)
                weight.data.add_(length * direction)
    torch.clear_autocast_cache()  # it holds the weights of the passes before
    try:
        yield once
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
        torch.clear_autocast_cache()
