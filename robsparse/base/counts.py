"""Exact numbers of nonzero weights.

This module does not import torch, because the checks of records use the same rules.
"""

from decimal import Decimal


def density(sparsity: float) -> float:
    """Return 1 - sparsity without a rounding error: 0.1 for 0.9, not 0.09999999999999998."""
    return float(1 - Decimal(str(sparsity)))


def keep_count(total: int, sparsity: float) -> int:
    """Return how many of `total` weights are nonzero at a sparsity in [0, 1).

    The result is int((1 - sparsity) * total), computed in exact decimals. Floats would lose a
    weight: int((1 - 0.9) * 1000) is 99.
    """
    return int(total * (1 - Decimal(str(sparsity))))


def layer_keep_count(size: int, sparsity: float) -> int:
    """Return how many of `size` weights are nonzero in a layer if all layers are equally sparse.

    The result is size - int(sparsity * size), computed in exact decimals.

    Source: inspire-group/hydra, behaviour of its top-k layers.
    """
    return size - int(size * Decimal(str(sparsity)))


def round_to_sum(wanted: dict[str, float], caps: dict[str, int], total: int) -> dict[str, int]:
    """Round `wanted` to integers that sum to `total`; none exceeds its cap.

    The values with the largest remainders are rounded up first.
    """
    assert total <= sum(caps.values()), "the total exceeds the sum of the caps"
    counts = {name: min(int(value), caps[name]) for name, value in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: int(wanted[name]) - wanted[name])
    missing = total - sum(counts.values())
    while missing > 0:
        for name in by_remainder:
            if missing > 0 and counts[name] < caps[name]:
                counts[name] += 1
                missing -= 1
    return counts
