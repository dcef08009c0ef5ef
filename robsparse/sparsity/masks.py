"""Masks of prunable weights: chosen, applied to a network, and made part of its weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.errors import TrainingError
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.layers import prunable


def random_masks(
    model: nn.Module, counts: dict[str, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks that keep so many weights in each layer, at positions drawn uniformly."""
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
