"""Can sparsity pay on a GPU? Lower bounds of time for each layer, from the data sheet of one GPU.

    python benchmarks/roofline.py [ARCH] [--images N]

For a layer, a kernel needs at least the time of its operations and the time of its bytes. Dense and
2:4 sparse layers use the tensor cores in bf16. Tensor cores cannot skip single weights, so an
unstructured kernel uses the other cores. There, each product of an active weight reads one
activation per image, and few of these reads can be shared: at 99 %, two output channels rarely use
the same input pixel. So it is also bound by the shared memory. All bounds are those of a perfect
kernel. Nothing is measured. docs/gpu_roofline.md has the result.
"""

import argparse
from dataclasses import dataclass

import torch

from robsparse import models
from robsparse.base import registry
from robsparse.evaluation.measure import measure_network
from robsparse.sparsity.budgets import erk_keep_counts
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.masks import random_masks

SPARSITIES = (0.9, 0.95, 0.99, 0.995)
BF16 = 2  # bytes


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU: operations (a product and a sum are two) and bytes a second."""

    name: str
    dense: float  # bf16 on tensor cores
    structured: float  # 2:4 sparse bf16 on tensor cores
    plain: float  # packed bf16 on the other cores
    memory: float
    shared: float  # shared memory: 128 bytes in each clock on each multiprocessor


# The vendor's data sheet; shared = 132 multiprocessors * 128 bytes * 1.83 GHz.
H100 = Gpu("H100 SXM", 989e12, 1979e12, 134e12, 3.35e12, 132 * 128 * 1.83e9)


@dataclass(frozen=True)
class Layer:
    """Multiply-accumulates and bytes of activations of one image; numbers of weights."""

    macs: float
    active_macs: float
    activations: float
    weights: int


def layers_of(arch: str, sparsity: float) -> list[Layer]:
    """The prunable layers of a network with ERK shares, for images of 3x32x32."""
    torch.manual_seed(0)
    model = models.build(arch, registry.entry("arch", arch).params(), (3, 32, 32), 10)
    keep = erk_keep_counts(model, sparsity)
    for name, mask in random_masks(model, keep, torch.Generator().manual_seed(0)).items():
        prunable(model)[name].weight.data.mul_(mask)
    found = []
    for row in measure_network(model.eval(), (3, 32, 32)).layers:
        weight = prunable(model)[row["layer"]].weight
        positions, size = row["positions"], row["size"]
        # A stride of 2 reads four times as many pixels. The bound leaves this out.
        activations = BF16 * positions * (weight.shape[0] + weight.shape[1])
        found.append(Layer(size * positions, row["nonzero"] * positions, activations, size))
    return found


def seconds(layers: list[Layer], gpu: Gpu, images: int) -> dict[str, float]:
    """Lower bounds of the time of one forward pass, by kind of kernel."""
    total = dict.fromkeys(("dense", "2:4", "unstructured"), 0.0)
    for layer in layers:
        maps = layer.activations * images
        total["dense"] += max(
            2 * layer.macs * images / gpu.dense, (maps + BF16 * layer.weights) / gpu.memory
        )
        total["2:4"] += max(
            2 * layer.macs * images / gpu.structured, (maps + BF16 * layer.weights) / gpu.memory
        )
        total["unstructured"] += max(
            2 * layer.active_macs * images / gpu.plain,
            BF16 * layer.active_macs * images / gpu.shared,
            maps / gpu.memory,
        )
    return total


def table(arch: str, gpu: Gpu, images: int) -> list[str]:
    """Lines of Markdown: the bounds over the sparsity, and their ratio to the dense bound."""
    lines = [
        "| sparsity | share of the multiply-accumulates | dense | 2:4 | unstructured "
        "| 2:4 / dense | unstructured / dense |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for sparsity in SPARSITIES:
        layers = layers_of(arch, sparsity)
        share = sum(x.active_macs for x in layers) / sum(x.macs for x in layers)
        times = seconds(layers, gpu, images)
        cells = " | ".join(f"{1e6 * value:.0f} µs" for value in times.values())
        gains = " | ".join(f"{times['dense'] / times[kind]:.2f}x" for kind in list(times)[1:])
        lines.append(f"| {sparsity:.1%} | {share:.1%} | {cells} | {gains} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arch", nargs="?", default="resnet18")
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    print(f"{arguments.arch}, {arguments.images} images of 3x32x32, {H100.name}\n")
    print("\n".join(table(arguments.arch, H100, arguments.images)))


if __name__ == "__main__":
    main()
