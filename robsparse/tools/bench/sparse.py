"""Benchmark of sparsity: a sparse network against a dense one, both in the code of this suite."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robsparse.compute.machine import computing
from robsparse.fast import folding
from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import Settings, Step
from robsparse.tools.stopwatch import Comparison, Side

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)
RIVAL = "our dense network"


def sparse(settings: Settings) -> Iterator[Comparison]:
    """Gradients of the images, and training steps of BCS with PGD-10, over the sparsity.

    The case "gradient" is a forward pass and the gradient of the images of a random sparse network
    with ERK shares: what crafting and attacks consist of. "step" is a whole training step of BCS.
    The precision of a row is that of both sides.
    """
    for arch, precision in itertools.product(settings.archs, settings.precisions):
        x, y = sides.images_of(arch, settings)
        dense = _gradient(sides.build(arch, settings), x, y, precision)
        dense_step = sides.our_step(Step(arch, "at", precision), settings)
        limit = sides.limit_of(arch, precision, 2, settings)
        for sparsity in SPARSITIES:
            case = f"sparse gradient {arch} {sparsity:g} {precision}"
            if settings.wants(case):
                ours = _gradient(sides.build(arch, settings, sparsity), x, y, precision)
                yield settings.watch.compare(case, ours, dense, RIVAL, count=len(x), limit=limit)
            case = f"sparse step {arch} {sparsity:g} {precision}"
            if settings.wants(case):
                kind = Step(arch, "at", precision, "bcs", sparsity, sparse_compute=True)
                ours = sides.our_step(kind, settings)
                yield settings.watch.compare(case, ours, dense_step, RIVAL, count=len(x))


def _gradient(model: nn.Module, x: Tensor, y: Tensor, precision: str) -> Side:
    """Return a pass over x in the folded view, with the gradient of the images."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    view = folding.folded_view(model.eval(), sides.laid_out(x, precision), dtype)
    return Side(functools.partial(_pass, view, x, y, precision))


def _pass(view: nn.Module, x: Tensor, y: Tensor, precision: str) -> None:
    images = sides.laid_out(x, precision).detach().requires_grad_()
    with computing(precision, x.device):
        loss = nn.functional.cross_entropy(view(images), y)
    torch.autograd.grad(loss, images)
