"""A small study for the harness, and commands of robsparse that run in a child of this process.

The child is a copy of this process (fork), which has imported everything. So a command takes as
long as its work, and it can be killed like any other process.
"""

import contextlib
import fcntl
import functools
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from robsparse.base import registry
from robsparse.cli.main import main
from robsparse.evaluation.cache import Cache
from robsparse.schema.training import Fit
from robsparse.study import loading
from robsparse.study.cells import Cell
from robsparse.study.study import Study
from robsparse.training import loop, resuming

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = "config/faults.yaml"
RESULTS = Path("results", "faults")
SELECTION = "last"
# What the commands import; a child has it already.
IMPORTED = (
    "robsparse.training.loop",
    "robsparse.evaluation.evaluate",
    "robsparse.collection.collect",
    "robsparse.figures.report",
    "robsparse.tools.export",
)


def nothing() -> None:
    """Change nothing."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended. `code` is negative if a signal ended it."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float
    killed: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines of its errors."""
        start = "robsparse: error: "
        return [line.removeprefix(start) for line in self.err.splitlines() if start in line]

    @property
    def crashed(self) -> bool:
        """Whether it ended with a traceback, or died by itself."""
        died = self.code < 0 and not self.killed
        return died or "Traceback (most recent call last)" in self.out + self.err


def make_study(folder: Path, methods: Sequence[str] = ()) -> Study:
    """Write the study file to a folder, with all registered methods or some of them.

    One seed and one sparsity. A stage has one epoch, and a method that does something every n
    epochs does it in each one.
    """
    data = yaml.safe_load((ROOT / "config" / "tiny.yaml").read_text())
    names = [name for name in registry.names("method") if name != "template"]
    data |= {"study": RESULTS.name, "title": "Faults"}
    data["grid"] |= {"methods": [*(methods or names)], "seeds": [0]}
    data["methods"] = {name: _short(name) for name in {*data["grid"]["methods"], "dense"}}
    data["evaluation"]["attacks"] = {"pgd": {"steps": 4, "restarts": 2}}
    data["evaluation"] |= {"n_examples": 12, "batch_size": 4}
    data["evaluation"]["selections"] = {SELECTION: ["clean", "pgd"]}
    data["machine"] = {"device": "cpu", "threads": 1}
    path = folder / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return loading.load(path)


def _short(name: str) -> dict[str, Any]:
    """Parameters of a method with short stages."""
    entry = registry.entry("method", name)
    fields = dict(entry.params())
    epochs = 5 if entry.literals.get("ADAPTS_SPARSITY") else 2
    stages = {key: {"epochs": epochs} for key, value in fields.items() if isinstance(value, Fit)}
    return stages | {key: 1 for key in fields if key.endswith("_every")}


def jobs(study: Study) -> list[tuple[str, Cell, tuple[str, ...]]]:
    """The trainings and evaluations of a study in a possible order: kind, cell, command."""
    found = []
    for cell in sorted(study.cells(), key=lambda one: study.starting_cell(one) is not None):
        words = (CONFIG, "--cell", cell.key)
        found.append(("train", cell, ("train", *words)))
        found.append(("evaluate", cell, ("evaluate", *words, "--selection", SELECTION)))
    return found


def prepare() -> None:
    """Import what the commands need, so that children have it."""
    # A background shell hands an ignored SIGINT down to its children; a terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["ROBSPARSE_COSTS"] = "estimated"
    for name in IMPORTED:
        importlib.import_module(name)


@dataclass
class Running:
    """A command in a child of this process."""

    words: tuple[str, ...]
    pid: int
    printed: tuple[int, int]  # pipes: they have no limit of space, as a file may have
    began: float
    killed: bool = False

    def kill(self, signum: signal.Signals) -> None:
        """Send a signal."""
        self.killed = True
        os.kill(self.pid, signum)

    def wait(self) -> Ended:
        """Wait for its end, at most ten minutes."""
        end = time.monotonic() + 600
        try:
            while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
                if time.monotonic() > end:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.01)
        except KeyboardInterrupt:  # it is in a process group of its own
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        out, err = map(_read_all, self.printed)
        code, seconds = os.waitstatus_to_exitcode(done[1]), time.monotonic() - self.began
        return Ended(self.words, code, out, err, seconds, self.killed)


def _read_all(pipe: int) -> str:
    with os.fdopen(pipe, errors="replace") as stream:
        return stream.read()


def start(words: Sequence[str], folder: Path, change: Callable[[], None] = nothing) -> Running:
    """Start a command of robsparse in a folder.

    change: what the child does before the command, e.g. `stop_after_steps`.
    """
    pipes = os.pipe(), os.pipe()
    for pipe in pipes:
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    began = time.monotonic()
    pid = os.fork()
    if pid:
        for pipe in pipes:
            os.close(pipe[1])
        return Running(tuple(words), pid, (pipes[0][0], pipes[1][0]), began)
    code = 1
    try:
        code = _child(list(words), folder, (pipes[0][1], pipes[1][1]), change)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _child(
    words: list[str], folder: Path, printed: tuple[int, int], change: Callable[[], None]
) -> int:
    """Run a command in this process, which is a child; return its exit code."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    for number, pipe in zip((1, 2), printed, strict=True):
        os.dup2(pipe, number)
        os.close(pipe)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    change()
    try:
        return main(words)
    except SystemExit as ended:  # from argparse
        return int(ended.code or 0)


def run(words: Sequence[str], folder: Path, change: Callable[[], None] = nothing) -> Ended:
    """Run a command of robsparse in a folder."""
    return start(words, folder, change).wait()


def save_every_epoch() -> None:
    """Save a checkpoint at the end of every epoch."""
    resuming.SECONDS_BETWEEN_CHECKPOINTS = 0.0


def stop_after_steps(steps: int) -> None:
    """Stop a training after some steps, as a signal does."""
    loop.train_cell = functools.partial(loop.train_cell, max_steps=steps)


def stop_after_parts(parts: int) -> None:
    """End an evaluation at once after some parts are in its cache, as SIGKILL does."""
    put, left = Cache.put, [parts]

    def put_and_stop(cache: Cache, name: str, **arrays: Any) -> None:
        put(cache, name, **arrays)
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    Cache.put = put_and_stop  # type: ignore[method-assign]


def limit_files(size: int) -> None:
    """Let the kernel refuse to write more bytes than `size` to a file (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
