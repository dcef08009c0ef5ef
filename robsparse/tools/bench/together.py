"""Benchmark of several networks that train at the same time."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from robsparse.base.errors import UsageError
from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import Settings, Step
from robsparse.tools.stopwatch import Comparison, Side


def together(settings: Settings) -> Iterator[Comparison]:
    """Dense steps of PGD-10 `at` for one network a thread: a process of one thread each, against
    one process with all threads that takes them in turn, or all at once by vmap. Raises UsageError
    for one thread: there is nothing to share out.
    """
    n = settings.threads
    if n < 2:
        raise UsageError(f"--threads {n}: 'together' trains a network a thread, expected 2 or more")
    for arch, precision in itertools.product(settings.archs, settings.precisions):
        case = f"together {arch} x{n} {precision}"
        if not settings.wants(case):
            continue
        kind = Step(arch, "at", precision)
        steps = [sides.our_step(kind, settings).work for _ in range(n)]
        count = n * sides.TOGETHER * settings.batch_size
        rivals = {
            "one process, in turn": functools.partial(sides.repeat, steps),
            "one process, vmap, fp32": functools.partial(
                sides.repeat, [sides.step_of_many(arch, settings)]
            ),
        }
        with sides.processes(kind, settings) as ours:
            for name, work in rivals.items():
                row = settings.watch.compare(case, ours, Side(work), name, count=count)
                # Other processes' memory is not in this one's account.
                yield dataclasses.replace(row, memory_mb=None, rival_memory_mb=None)
