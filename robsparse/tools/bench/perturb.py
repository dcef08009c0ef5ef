"""Benchmark of crafting."""

import functools
import itertools
from collections.abc import Iterator

from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import EPS, STEP, STEPS, Settings
from robsparse.tools.stopwatch import Comparison, Side


def perturb(settings: Settings) -> Iterator[Comparison]:
    """Crafting with PGD-10 on a dense network."""
    textbook = sides.load_textbook()
    for arch, precision in itertools.product(settings.archs, settings.precisions):
        case = f"perturb {arch} {precision}"
        if not settings.wants(case):
            continue
        x, y = sides.images_of(arch, settings)
        model, attacker = (
            sides.build(arch, settings),
            sides.attacker_of(precision, settings.device),
        )
        yield settings.watch.compare(
            case,
            Side(functools.partial(attacker.attack_labels, model, sides.laid_out(x, precision), y)),
            Side(functools.partial(textbook.pgd, model, x, y, (EPS, STEP, STEPS))),
            "textbook",
            count=len(x),
            limit=sides.limit_of(arch, precision, 2 * STEPS, settings),
        )
