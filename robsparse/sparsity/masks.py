"""Masks of prunable weights: to choose them, to apply them, and to make weights plain again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.errors import TrainingError
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.compact_weight import CompactWeight
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.patterns import largest_of_groups


def random_masks(
    model: nn.Module,
    counts: dict[str, int],
    generator: torch.Generator,
    pattern: str | None = None,
) -> dict[str, Tensor]:
    """Return masks that keep counts[name] weights in each layer, at random positions.

    Positions are drawn one after the other, each uniformly among the positions that are left. With
    an N:M pattern, no position is left in a group after N draws.
    """
    masks = {}
    for name, module in prunable(model).items():
        weight = module.weight
        order = torch.randperm(weight.numel(), generator=generator, device=weight.device)
        earliness = torch.empty_like(order)
        earliness[order] = torch.arange(len(order), 0, -1, device=weight.device)
        masks[name] = top_k_mask(earliness.double().view_as(weight), counts[name], pattern)
    return masks


def require_finite(score: Tensor) -> Tensor:
    """Return the scores unchanged.

    Raises:
        TrainingError: if a score is NaN or infinite, because such scores cannot be ranked.
    """
    if not math.isfinite(score.sum()):  # the sum of finite scores can be infinite too
        wrong = score.numel() - int(score.isfinite().sum())
        if wrong:
            raise TrainingError(f"{wrong} of {score.numel()} scores of weights are not finite")
    return score


def top_k_mask(score: Tensor, k: int, pattern: str | None = None) -> Tensor:
    """Return a boolean mask of exactly the k largest entries of `score` (any shape).

    The k-th largest entry is selected without sorting. If several entries are equal to it, the
    first ones are kept.

    With an N:M pattern, the k largest entries are selected among the N largest of each group. No
    other mask of this pattern with k entries has a larger sum. k is at most
    `robsparse.sparsity.patterns.capacity`.

    Raises:
        TrainingError: if an entry is not finite.
    """
    flat = require_finite(score.detach().flatten())
    if pattern is not None:
        mask = largest_of_groups(score.detach(), pattern)
        mask[mask.clone()] = top_k_mask(score.detach()[mask], k)
        return mask
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    smallest: Tensor | float
    if flat.is_cuda:
        smallest = flat.topk(k, sorted=False).values.min()
    else:  # here NumPy is ten times faster than torch
        smallest = float(np.partition(flat.numpy(), len(flat) - k)[len(flat) - k])
    mask = flat > smallest
    equal = (flat == smallest).nonzero().squeeze(1)
    mask[equal[: k - int(mask.sum())]] = True
    return mask.view_as(score)


class Masked(nn.Module):
    """Parametrisation w -> w * mask with a fixed mask. Masked weights and gradients are zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def active(self, weight: Tensor) -> Tensor:
        """Return the active positions (bool, the weight's shape)."""
        return self.mask


def magnitude_masks(
    model: nn.Module, sparsity: float, pattern: str | None = None
) -> dict[str, Tensor]:
    """Return masks of the largest `|w|` of each layer. All layers keep the same share."""
    keep = layer_keep_counts(model, sparsity)
    return {
        name: top_k_mask(module.weight.abs(), keep[name], pattern)
        for name, module in prunable(model).items()
    }


def global_masks(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Return masks of the `keep` largest scores of all layers together."""
    flat = top_k_mask(torch.cat([score.flatten() for score in scores.values()]), keep)
    parts = flat.split([score.numel() for score in scores.values()])
    return {
        name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Apply a fixed mask to each named layer."""
    modules = prunable(model)
    for name, mask in masks.items():
        parametrize.register_parametrization(modules[name], "weight", Masked(mask))


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[None]:
    """Compute every parametrised weight once and use it for all passes inside the block.

    The weights are computed here, with gradients. Otherwise, a first pass without gradients would
    compute them, and the training pass would get weights without gradients.
    """
    with parametrize.cached():
        for module in prunable(model).values():
            _ = module.weight
        yield


def bake(model: nn.Module) -> None:
    """Replace every parametrised weight by a plain weight with its current value."""
    for module in prunable(model).values():
        if parametrize.is_parametrized(module, "weight"):
            weight = module.weight
            compact = isinstance(weight, CompactWeight)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=not compact)
            if isinstance(weight, CompactWeight):
                module.weight.data = weight.dense().detach()
            # The weight is now the last parameter. Make it the first one again, because an
            # optimiser identifies parameters by their order.
            for name in [name for name in module._parameters if name != "weight"]:
                module._parameters[name] = module._parameters.pop(name)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a plain network with the current weights (copied, on the CPU)."""
    state = {
        name: value for name, value in model.state_dict().items() if "parametrizations." not in name
    }
    for name, module in prunable(model).items():
        state[f"{name}.weight"] = module.weight
    return {name: value.detach().cpu().clone() for name, value in state.items()}
