"""Benchmark of AutoAttack."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robsparse.base import registry
from robsparse.evaluation.attacks import AttackContext
from robsparse.fast import folding
from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import Settings
from robsparse.tools.stopwatch import Comparison, Side

SURVIVE = 1e-6  # an eps that no image breaks at: every attack runs to its end


def evaluate(settings: Settings) -> Iterator[Comparison]:
    """AutoAttack standard on images that all survive, against one call of the stock package."""
    module = registry.load("attack", "autoattack")
    gradients, forwards = module.passes(module.Params())
    for arch, sparsity in itertools.product(settings.archs, (0.0, 0.9, 0.99)):
        case = f"evaluate {arch} {sparsity:g}"
        if not settings.wants(case):
            continue
        x, _ = sides.images_of(arch, settings, settings.images)
        model = sides.build(arch, settings, sparsity).eval()
        with torch.no_grad():
            x, y = x.cpu(), model(x).argmax(1).cpu()
        threat = AttackContext("Linf", SURVIVE, 0, len(x), settings.device, report=lambda _: None)
        stock = AutoAttack(model, eps=SURVIVE, seed=0, device=settings.device)

        def ours(
            model: nn.Module = model, given: tuple[Tensor, Tensor] = (x, y), threat: Any = threat
        ) -> None:
            view = folding.folded_view(model, given[0].to(settings.device))
            module.run(view, *given, module.Params(), threat)

        yield dataclasses.replace(settings.watch, repeats=1).compare(
            case,
            Side(ours),
            Side(functools.partial(stock.run_standard_evaluation, x, y, batch_size=len(x))),
            "stock package",
            count=len(x),
            limit=sides.limit_of(arch, "fp32", 2 * gradients + forwards, settings),
            warm_up=False,
        )
