"""Benchmark of the rewiring of BCS."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import Settings, Step
from robsparse.tools.stopwatch import Comparison, Side


def rewire(settings: Settings) -> Iterator[Comparison]:
    """Noise and rewiring of BCS after a step, without the step; and their share of a step."""
    textbook = sides.load_textbook()
    for arch, sparsity in itertools.product(settings.archs, (0.9, 0.99)):
        case = f"rewire {arch} {sparsity:g}"
        if not settings.wants(case):
            continue
        ours, density = sides.our_rewiring(arch, sparsity, settings), 1 - sparsity
        model = textbook.sparsify(sides.build(arch, settings), "sampled", density)
        theirs = Side(
            functools.partial(textbook.rewire, model, density, 0.1),
            functools.partial(sides.make_weights_dormant, model),
        )
        options: dict[str, Any] = {"count": 1, "unit": "steps/s"}
        yield settings.watch.compare(case, ours, theirs, "textbook", **options)
        for precision in settings.precisions:
            step = sides.our_step(Step(arch, "at", precision, "bcs", sparsity), settings)
            yield settings.watch.compare(
                f"{case} {precision}", ours, step, "whole step of PGD-10", **options
            )
