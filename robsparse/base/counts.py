"""Exact whole numbers of weights. No torch in here: records are checked against the same rule."""

from decimal import Decimal


def density(sparsity: float) -> float:
    """1 - sparsity without the rounding of floats: 0.1 for 0.9, not 0.09999999999999998."""
    return float(1 - Decimal(str(sparsity)))


def keep_count(total: int, sparsity: float) -> int:
    """Weights that may be live among `total`: int((1 - sparsity) * total), in exact decimals.

    Floating point would lose a weight: int((1 - 0.9) * 1000) is 99.
    """
    return int(total * (1 - Decimal(str(sparsity))))


def layer_keep_count(size: int, sparsity: float) -> int:
    """Nonzero weights of one layer when all layers have the same sparsity: n - int(sparsity * n).

    Source: inspire-group/hydra, behaviour of its top-k layers.
    """
    return size - int(size * Decimal(str(sparsity)))


def round_to_sum(wanted: dict[str, float], caps: dict[str, int], total: int) -> dict[str, int]:
    """Integers near `wanted` that sum to `total`, none above its cap (largest remainder first)."""
    assert total <= sum(caps.values()), "more is asked for than there is room for"
    counts = {name: min(int(value), caps[name]) for name, value in wanted.items()}
    by_remainder = sorted(wanted, key=lambda name: int(wanted[name]) - wanted[name])
    missing = total - sum(counts.values())
    while missing > 0:
        for name in by_remainder:
            if missing > 0 and counts[name] < caps[name]:
                counts[name] += 1
                missing -= 1
    return counts
