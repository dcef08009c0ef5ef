"""The size of a network, layer by layer: weights, multiply-accumulates. And its latency."""

import statistics
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robsparse.fast import folding
from robsparse.sparsity.layers import prunable

WARM_UP, REPEATS = 10, 101  # passes for the latency


@dataclass(frozen=True)
class NetworkSize:
    """The size of a network.

    columns: the columns of a result row.
    layers: the size, the nonzero weights and the number of positions of each prunable layer.
    histogram: counts of nonzero weights by magnitude.
    """

    columns: dict[str, Any]
    layers: list[dict[str, Any]]
    histogram: list[dict[str, float]]


def measure_network(model: nn.Module, image_shape: tuple[int, int, int]) -> NetworkSize:
    """Count nonzero weights and the multiply-accumulates of one image, dense and sparse.

    The sparse count is the number for an ideal sparse kernel. No sparse kernel is timed here. A
    layer is counted for each use, and not at all if it is never used. Without prunable layers, all
    counts are 0.
    """
    modules = prunable(model)
    positions = _positions(model, modules, image_shape)
    sizes = {name: module.weight.numel() for name, module in modules.items()}
    nonzero = {name: int(m.weight.detach().count_nonzero()) for name, m in modules.items()}
    size = sum(sizes.values())
    columns = {
        "prunable": size,
        "nonzero": sum(nonzero.values()),
        "sparsity_reached": 1 - sum(nonzero.values()) / size if size else 0.0,
        "layers": len(modules),
        "dense_macs": sum(sizes[name] * positions[name] for name in modules),
        "sparse_macs": sum(nonzero[name] * positions[name] for name in modules),
    }
    layers = [
        {
            "layer": name,
            "size": sizes[name],
            "nonzero": nonzero[name],
            "positions": positions[name],
        }
        for name in modules
    ]
    return NetworkSize(columns, layers, magnitude_histogram(model))


def _positions(
    model: nn.Module,
    modules: Mapping[str, nn.Conv2d | nn.Linear],
    image_shape: tuple[int, int, int],
) -> dict[str, int]:
    """Return how often each layer applies its weights to one image (0 if it is never used)."""
    positions = dict.fromkeys(modules, 0)

    def make_hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            positions[name] += output.numel() // modules[name].weight.shape[0]

        return count

    hooks = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    device = next(iter([*model.parameters(), torch.zeros(0)])).device
    with torch.no_grad():
        model(torch.zeros(1, *image_shape, device=device))
    for hook in hooks:
        hook.remove()
    return positions


def magnitude_histogram(model: nn.Module) -> list[dict[str, float]]:
    """Return counts of nonzero prunable weights by magnitude: ten bins per decade, 1e-12 to 100.

    The smallest bin starts at 0 and the largest bin has no upper end, so every weight is counted.
    """
    exponents = torch.arange(-120, 21, dtype=torch.float64) / 10
    counts = torch.zeros(len(exponents) + 1, dtype=torch.int64)
    for module in prunable(model).values():
        size = module.weight.detach().abs()
        place = torch.bucketize(size[size > 0].double().log10().cpu(), exponents, right=True)
        counts += torch.bincount(place, minlength=len(counts))
    edges = [0.0, *(10**exponents).tolist(), 1e3]
    return [
        {"low": low, "high": high, "count": count}
        for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False)
        if count
    ]


def latency_ms(network: nn.Module, images_NCHW: Tensor, *, folded: bool) -> float:
    """Return the median time in milliseconds of the logits of a single image.

    It is measured on the folded view if `folded`, with the threads of this process, and after some
    passes that do not count. Other work of the machine makes it longer.

    Args:
        network: a network in eval mode.
        images_NCHW: images on the device of the network. The first one is timed.
        folded: use the folded view, as the attacks do.
    """
    # Loaded here because its import is slow and few studies measure the latency.
    from torch.utils import benchmark  # noqa: PLC0415

    run = folding.folded_view(network, images_NCHW) if folded else network
    image = images_NCHW[:1].contiguous()
    with torch.no_grad():
        # The timer waits for the device.
        timer = timeit.Timer(lambda: run(image), timer=benchmark.timer)
        seconds = timer.repeat(WARM_UP + REPEATS, number=1)
    return 1000 * statistics.median(seconds[WARM_UP:])
