"""The layers whose weights are prunable, and what is behind a parametrised weight.

Prunable means every convolution and linear weight, first and last layer included; biases and batch
norm are not.
"""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


def nonzero_count(model: nn.Module) -> int:
    """Number of prunable weights that are not exactly zero in the forward pass."""
    with torch.no_grad():
        return sum(int(module.weight.count_nonzero()) for module in prunable(model).values())
