"""The layers with prunable weights, and the parameter of a parametrised weight.

The weights of all convolution and linear layers are prunable, also in the first and the last layer.
Biases and batch norm are not prunable.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Prunable = nn.Conv2d | nn.Linear
Kind = TypeVar("Kind", bound=nn.Module)


def prunable(model: nn.Module) -> dict[str, Prunable]:
    """Return the modules with a prunable `.weight`, by name, in the order of their definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Prunable)}


def trained_weight(module: Prunable) -> nn.Parameter:
    """Return the parameter of a parametrised weight. The optimiser changes this parameter."""
    return cast(nn.Parameter, _parametrisations(module).original)


def gradient(weight: Tensor) -> Tensor:
    """Return the gradient of a parameter after a backward pass of a loss that depends on it."""
    assert weight.grad is not None
    return weight.grad


def parametrisation(module: Prunable, kind: type[Kind]) -> Kind:
    """Return the parametrisation of the weight of a layer.

    Raises:
        TypeError: if it is not of the given kind.
    """
    found = _parametrisations(module)[0]
    if not isinstance(found, kind):
        raise TypeError(f"expected a weight with {kind.__name__}, found {type(found).__name__}")
    return found


def active_mask(module: Prunable) -> Tensor | None:
    """Return the active positions of a layer (bool), or None if they are not known.

    They are known if the only parametrisation of the weight has a method `active`, which computes
    them from the parameter. All other weights are then 0.
    """
    if not parametrize.is_parametrized(module, "weight"):
        return None
    found = _parametrisations(module)
    active = getattr(found[0], "active", None)
    return None if active is None or len(found) != 1 else cast(Tensor, active(found.original))


def computed_weight(module: Prunable) -> Tensor:
    """Return a parametrised weight as its parameters make it now, without any stored value."""
    return cast(Tensor, _parametrisations(module)())


def _parametrisations(module: Prunable) -> parametrize.ParametrizationList:
    named = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, named["weight"])


def weight_count(model: nn.Module) -> int:
    """Return the number of prunable weights."""
    return sum(module.weight.numel() for module in prunable(model).values())


def nonzero_count(model: nn.Module) -> int:
    """Return the number of prunable weights that are not exactly zero in the forward pass."""
    with torch.no_grad():
        return sum(int(module.weight.count_nonzero()) for module in prunable(model).values())
