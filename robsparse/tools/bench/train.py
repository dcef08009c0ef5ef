"""Benchmark of training: steps of PGD-10 `at` and of TRADES."""

import functools
import itertools
from collections.abc import Iterator

from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import Settings, Step
from robsparse.tools.stopwatch import Comparison

NETWORKS = (
    {"method": "dense"},
    {"method": "static_random", "sparsity": 0.9, "layers": "masked"},
    {"method": "bcs", "sparsity": 0.9, "layers": "sampled"},
    {"method": "bcs", "sparsity": 0.99, "layers": "sampled"},
    {"method": "hydra", "sparsity": 0.9, "layers": "scored"},
)


def train(settings: Settings) -> Iterator[Comparison]:
    """Training steps of PGD-10 `at` and of TRADES: dense, masked, BCS, HYDRA's pruning. BCS is
    compared with our own dense step too.
    """
    kinds = [
        Step(arch, objective, precision, **network)
        for arch, objective, precision in itertools.product(
            settings.archs, ("at", "trades"), settings.precisions
        )
        for network in NETWORKS
    ]
    for kind in kinds:
        case = f"train {kind}"
        if not settings.wants(case):
            continue
        compare = functools.partial(settings.watch.compare, case, sides.our_step(kind, settings))
        count = settings.batch_size
        limit = sides.limit_of(kind.arch, kind.precision, sides.passes(kind.objective), settings)
        yield compare(sides.their_step(kind, settings), "textbook", count=count, limit=limit)
        if kind.method == "bcs":
            dense = sides.our_step(Step(kind.arch, kind.objective, kind.precision), settings)
            yield compare(dense, "our dense step", count=count)
