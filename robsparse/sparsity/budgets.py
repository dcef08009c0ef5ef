"""The number of weights that each layer keeps. The sum meets the sparsity exactly."""

import math

from torch import nn

from robsparse.base.counts import keep_count, layer_keep_count, round_to_sum
from robsparse.sparsity.layers import prunable, weight_count
from robsparse.sparsity.patterns import capacity


def layer_keep_counts(model: nn.Module, sparsity: float) -> dict[str, int]:
    """Return the nonzero weights of each layer if all layers have the same sparsity."""
    return {
        name: layer_keep_count(module.weight.numel(), sparsity)
        for name, module in prunable(model).items()
    }


def capacities(model: nn.Module, pattern: str | None) -> dict[str, int]:
    """Return how many weights of each layer may be nonzero. Without a pattern: all."""
    return {
        name: capacity(module.weight.shape, pattern) for name, module in prunable(model).items()
    }


def erk_keep_counts(
    model: nn.Module, sparsity: float, pattern: str | None = None
) -> dict[str, int]:
    """Return the nonzero weights of each layer by Erdos-Renyi-Kernel shares.

    Their sum is exactly keep_count. The density of a layer is proportional to
    (sum of its dimensions) / (product of its dimensions), and at most 1, or at most that of the
    N:M pattern. The weights that exceed a full layer are distributed over the other layers.

    Source: RigL (Evci et al., ICML 2020), section 3, "Sparsity distribution".
    """
    shapes = {name: module.weight.shape for name, module in prunable(model).items()}
    budget = keep_count(weight_count(model), sparsity)
    caps, full = capacities(model, pattern), set[str]()
    while True:
        free = {name: float(sum(shapes[name])) for name in caps if name not in full}
        room = budget - sum(caps[name] for name in full)
        scale = room / sum(free.values()) if free else 0.0
        over = {name for name, raw in free.items() if raw * scale > caps[name]}
        if not over:
            break
        full |= over
    wanted = {name: float(caps[name]) if name in full else free[name] * scale for name in caps}
    return round_to_sum(wanted, caps, budget)


def quota_keep_counts(model: nn.Module, sparsity: float) -> dict[str, int]:
    """Return the nonzero weights of each layer by ideal gas quotas.

    Their sum is exactly keep_count. A layer of n weights has density 1 / (1 + F n). F is the same
    for all layers and is chosen to meet the budget. Small layers are denser than large ones.

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
