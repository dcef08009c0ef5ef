"""Masks, counts and layer shares. Prunable means every convolution and linear weight, first and
last layer included; biases and batch norm are not.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.counts import keep_count, layer_keep_count, round_to_sum
from robsparse.base.errors import TrainingError

Prunable = nn.Conv2d | nn.Linear
Kind = TypeVar("Kind", bound=nn.Module)


def prunable(model: nn.Module) -> dict[str, Prunable]:
    """The modules whose `.weight` is prunable, by name, in forward order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Prunable)}


def trained_weight(module: Prunable) -> nn.Parameter:
    """The parameter behind a parametrised weight: what the optimiser changes."""
    return cast(nn.Parameter, _parametrisations(module).original)


def gradient(weight: Tensor) -> Tensor:
    """The gradient of a parameter that the loss depends on, once it has been differentiated."""
    assert weight.grad is not None
    return weight.grad


def parametrisation(module: Prunable, kind: type[Kind]) -> Kind:
    """The parametrisation of a layer's weight. Raises TypeError if it is of another kind."""
    found = _parametrisations(module)[0]
    if not isinstance(found, kind):
        raise TypeError(f"expected a weight behind {kind.__name__}, found {type(found).__name__}")
    return found


def _parametrisations(module: Prunable) -> parametrize.ParametrizationList:
    named = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, named["weight"])


def weight_count(model: nn.Module) -> int:
    """Number of prunable weights."""
    return sum(module.weight.numel() for module in prunable(model).values())


def live_count(model: nn.Module) -> int:
    """Number of prunable weights that are not exactly zero in the forward pass."""
    with torch.no_grad():
        return sum(int(module.weight.count_nonzero()) for module in prunable(model).values())


def layer_keep_counts(model: nn.Module, sparsity: float) -> dict[str, int]:
    """Nonzero weights of each layer when all have the same sparsity."""
    return {
        name: layer_keep_count(module.weight.numel(), sparsity)
        for name, module in prunable(model).items()
    }


def erk_keep_counts(model: nn.Module, sparsity: float) -> dict[str, int]:
    """Nonzero weights of each layer by Erdos-Renyi-Kernel shares; they sum to keep_count exactly.

    A layer's density is proportional to (sum of its dimensions) / (product of its dimensions),
    capped at 1; what a capped layer cannot take goes to the others.
    Source: RigL (Evci et al., ICML 2020), section 3, "Sparsity distribution".
    """
    shapes = {name: module.weight.shape for name, module in prunable(model).items()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    budget = keep_count(sum(sizes.values()), sparsity)
    full: set[str] = set()
    while True:
        free = {name: float(sum(shapes[name])) for name in sizes if name not in full}
        room = budget - sum(sizes[name] for name in full)
        scale = room / sum(free.values()) if free else 0.0
        over = {name for name, raw in free.items() if raw * scale > sizes[name]}
        if not over:
            break
        full |= over
    wanted = {name: float(sizes[name]) if name in full else free[name] * scale for name in sizes}
    return round_to_sum(wanted, sizes, budget)


def quota_keep_counts(model: nn.Module, sparsity: float) -> dict[str, int]:
    """Nonzero weights of each layer by ideal gas quotas; they sum to keep_count exactly.

    A layer of n weights has density 1 / (1 + F n), with the one F that meets the budget: small
    layers stay denser than large ones.
    Source: VITA-Group/Sparsity-Win-Robust-Generalization, behaviour of its initialisation "igq".
    """
    sizes = {name: module.weight.numel() for name, module in prunable(model).items()}
    budget = keep_count(sum(sizes.values()), sparsity)
    low, high = 0.0, 1e20
    for _ in range(200):  # bisection in the logarithm of F + 1e-20
        force = math.sqrt((low + 1e-20) * (high + 1e-20))
        total = sum(n / (1 + force * n) for n in sizes.values())
        low, high = (force, high) if total > budget else (low, force)
    wanted = {name: n / (1 + force * n) for name, n in sizes.items()}
    return round_to_sum(wanted, sizes, budget)


def random_masks(
    model: nn.Module, counts: dict[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks with so many live weights in each layer, at positions drawn uniformly."""
    masks = {}
    for name, module in prunable(model).items():
        weight = module.weight
        order = torch.randperm(weight.numel(), generator=generator, device=weight.device)
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[order[: counts[name]]] = True
        masks[name] = mask.view_as(weight)
    return masks


def rankable(score: Tensor) -> Tensor:
    """The scores as they are. Raises TrainingError if one is NaN or infinite and so has no rank."""
    if not math.isfinite(score.sum()):  # which may be too large for a float itself
        wrong = score.numel() - int(score.isfinite().sum())
        if wrong:
            raise TrainingError(f"{wrong} of {score.numel()} scores of weights are not finite")
    return score


def top_k_mask(score: Tensor, k: int) -> Tensor:
    """Boolean mask of exactly the k largest entries of `score` (any shape).

    Nothing is sorted: the k-th largest entry is selected, and of those equal to it the first count.
    Raises TrainingError if an entry is not finite.
    """
    flat = rankable(score.detach().flatten())
    if k == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    smallest: Tensor | float
    if flat.is_cuda:
        smallest = flat.topk(k, sorted=False).values.min()
    else:  # NumPy selects ten times as fast as torch
        smallest = float(np.partition(flat.numpy(), len(flat) - k)[len(flat) - k])
    mask = flat > smallest
    equal = (flat == smallest).nonzero().squeeze(1)
    mask[equal[: k - int(mask.sum())]] = True
    return mask.view_as(score)


class Masked(nn.Module):
    """Parametrisation w -> w * mask with a fixed mask: zeros stay zero, their gradient too."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def magnitude_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Per layer, the mask of the largest |w| (the same share in every layer)."""
    keep = layer_keep_counts(model, sparsity)
    return {
        name: top_k_mask(module.weight.abs(), keep[name])
        for name, module in prunable(model).items()
    }


def global_masks(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest scores of all layers together."""
    flat = top_k_mask(torch.cat([score.flatten() for score in scores.values()]), keep)
    parts = flat.split([score.numel() for score in scores.values()])
    return {
        name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Fix the mask of each named layer from here on."""
    modules = prunable(model)
    for name, mask in masks.items():
        parametrize.register_parametrization(modules[name], "weight", Masked(mask))


@contextmanager
def effective_weights(model: nn.Module) -> Iterator[None]:
    """Form every parametrised weight once and use it for all passes inside the block.

    They are formed with gradients here, because the first pass inside may be one without, whose
    weights would then serve the training pass too.
    """
    with parametrize.cached():
        for module in prunable(model).values():
            _ = module.weight
        yield


def bake(model: nn.Module) -> None:
    """Turn every parametrised weight into a plain one with the value that it has now."""
    for module in prunable(model).values():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            # The weight is the last of the parameters then, and comes back to its place, the first:
            # optimisers know parameters by their order.
            for name in [name for name in module._parameters if name != "weight"]:
                module._parameters[name] = module._parameters.pop(name)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the plain network that computes what `model` computes now (copied, on CPU)."""
    state = {
        name: value for name, value in model.state_dict().items() if "parametrizations." not in name
    }
    for name, module in prunable(model).items():
        state[f"{name}.weight"] = module.weight
    return {name: value.detach().cpu().clone() for name, value in state.items()}
