"""Measures this suite against a textbook loop and the stock package, and against the machine.

Every pair runs in one process, in turn, after a warm-up; medians are compared. The limit is what
the fastest matrix product or convolution of this machine reaches at the same precision, or its
copying of memory: no code with dense kernels does more images a second than that many operations
allow. Each case is one module of this package.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import check_writable, write_json
from robsparse.compute.machine import (
    device_name,
    pick_device,
    pick_precision,
    prepare,
)
from robsparse.tools.bench import (
    data,
    evaluate,
    inference,
    perturb,
    rewire,
    sparse,
    together,
    train,
)
from robsparse.tools.bench.sides import Settings
from robsparse.tools.stopwatch import Comparison

CASES: dict[str, Callable[[Settings], Iterator[Comparison]]] = {
    "train": train.train,
    "perturb": perturb.perturb,
    "evaluate": evaluate.evaluate,
    "sparse": sparse.sparse,
    "rewire": rewire.rewire,
    "data": data.data,
    "together": together.together,
    "inference": inference.inference,
}


def settings_of(
    archs: list[str], precisions: list[str], *, device: str, threads: int, **counts: Any
) -> Settings:
    """Checked settings. Raises UsageError for an arch that is not registered."""
    for name in archs:
        registry.entry("arch", name)
    prepare(threads)
    where = pick_device(device)
    picked = tuple(dict.fromkeys(pick_precision(wanted, where) for wanted in precisions))
    return Settings(tuple(archs), picked, device=where, threads=threads, **counts)


def run(case: str, settings: Settings, file: Path | None) -> str:
    """Measure one case; returns a Markdown table. `file` gets the rows as JSON.

    Raises UsageError when `file` cannot be written or no case has the wanted name.
    """
    if file is not None:
        if file.is_dir():
            raise UsageError(f"{file}: a folder, expected the name of a file")
        check_writable(file.parent)
    device = device_name(settings.device)
    times = "once each" if case == "evaluate" else f"medians of {settings.repeats}"
    print(f"{case} on {device}, {times}", flush=True)
    rows = []
    for row in CASES[case](settings):
        print(_line(row), flush=True)
        rows.append(row)
    if not rows:
        raise UsageError(f"--only {settings.only}: no case of '{case}' has that in its name")
    if file is not None:
        plain = [dataclasses.asdict(row) for row in rows]
        write_json(file, {"device": device, "rows": plain})
    return "\n".join(["", *_table(rows), *([f"rows: {file}"] if file else [])])


def _line(row: Comparison) -> str:
    return f"{row.case}: {row.ours:.4g} {row.unit}, {row.rival_name} {row.rival:.4g}"


def _table(rows: list[Comparison]) -> list[str]:
    lines = [
        "| case | ours | rival | ratio | share of the limit | memory, ours and rival |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "n/a" if row.limit_share is None else f"{row.limit_share:.0%}"
        memory = [row.memory_mb, row.rival_memory_mb]
        sizes = "n/a" if None in memory else ", ".join(f"{value:.0f} MB" for value in memory)
        lines.append(
            f"| {row.case} | {row.ours:.4g} {row.unit} | {row.rival_name}: {row.rival:.4g} "
            f"| {row.ratio:.2f} | {share} | {sizes} |"
        )
    return lines
