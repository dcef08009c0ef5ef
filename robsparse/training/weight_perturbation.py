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
A penalty of a stage (ADMM, HARP) is evaluated at the perturbed weights, and it does not change the
direction of the perturbation.

S2AP does the same with the scores that decide a mask.

Source: Piras et al., "S2AP: Score-space sharpness minimization for adversarial pruning", 2025
(arXiv 2510.18381). Neither its full text nor its code was read. From public reviews of the paper:
the scores s of the mask search minimise the largest robust loss at s + z, where ||z|| is at most
gamma ||s|| in each layer; the first five epochs are without it. Decided here, as for AWP: z is one
step along the gradient, with the largest length; images are crafted at s, and both losses use them;
s is restored before the step of the optimiser; the shares of layers that HARP learns are not
perturbed. The authors also finetune with AWP (`training.awp`, which is for all stages).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.sparsity.layers import computed_weight, parametrisation, prunable
from robsparse.sparsity.scores import Scored
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
    gradients = _gradients(model, objective, once, batch, weights)
    with _moved(weights, gradients, gamma):
        yield once


@contextmanager
def perturbed_scores(
    model: nn.Module,
    objective: Objective,
    attacker: Attacker,
    batch: tuple[Tensor, Tensor],
    gamma: float,
) -> Iterator[Attacker]:
    """Perturb the scores of all layers inside the block (S2AP); else as `perturbed_weights`.

    Inside the block, the effective weights have the mask of the perturbed scores.
    """
    if not gamma:
        yield attacker
        return
    once = CraftedOnce.from_attacker(attacker, model)
    modules = prunable(model).values()
    weights = [module.weight for module in modules]
    scores = [parametrisation(module, Scored).score for module in modules]
    found = _gradients(model, objective, once, batch, weights)
    given = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    # The graph from scores to weights is needed again by the step.
    gradients = torch.autograd.grad(weights, scores, given, retain_graph=True)
    try:
        with _moved(scores, gradients, gamma):
            _renew_weights(model)
            yield once
    finally:
        _renew_weights(model)


def _gradients(
    model: nn.Module,
    objective: Objective,
    once: CraftedOnce,
    batch: tuple[Tensor, Tensor],
    weights: list[Tensor],
) -> Sequence[Tensor | None]:
    """Return the gradients of the loss of a batch. Batch norm forgets the passes of the loss."""
    gradients = torch.autograd.grad(objective(model, *batch, once), weights, allow_unused=True)
    with torch.no_grad():
        for buffer, value in once.statistics:
            buffer.copy_(value)
    return gradients


@contextmanager
def _moved(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], gamma: float
) -> Iterator[None]:
    """Move each tensor inside the block along its gradient, by the share gamma of its norm.

    Entries that are 0 do not move.
    """
    before = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                direction = gradient * (tensor != 0)
                length = gamma * tensor.norm() / (direction.norm() + SMALLEST_NORM)
                tensor.data.add_(length * direction)
    torch.clear_autocast_cache()  # it holds the weights of the passes before
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)
        torch.clear_autocast_cache()


def _renew_weights(model: nn.Module) -> None:
    """Set the effective weights, which are computed once for a step, to those of the parameters."""
    with torch.no_grad():
        for module in prunable(model).values():
            module.weight.data.copy_(computed_weight(module))
    torch.clear_autocast_cache()
