"""Parts of several commands: their type, their arguments, loading the study and finding a cell."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from robsparse.base import gpus
from robsparse.base.errors import UsageError, nearest_match
from robsparse.schema.evaluation import Selection
from robsparse.schema.machine import MOST_THREADS
from robsparse.study import loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

EXIT_FAILED, EXIT_USAGE, EXIT_RESUME, EXIT_INTERRUPTED = 1, 2, 75, 130


@dataclass(frozen=True)
class Command:
    """One command of `robsparse`.

    text: one line of help.
    detail: sentences on what the command does and writes.
    config: whether the first argument is a study file ("needed", "optional" or "none").
    results: whether the command has the option --results.
    """

    name: str
    run: Callable[[argparse.Namespace], int | None]
    text: str
    detail: str
    config: str = "needed"
    results: bool = True
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


def thread_count(text: str) -> int:
    number = positive(text)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{number}: expected at most {MOST_THREADS} threads")
    return number


def add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: the study's machine.device)",
    )
    command.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="CPU threads (default: the study's machine.threads)",
    )


def reserved_gpu(arguments: argparse.Namespace, study: Study) -> AbstractContextManager[None]:
    """Return a context in which this process has a GPU, if it may use one (`gpus.one_reserved`)."""
    if (arguments.device or study.machine.device) == "cpu":
        return nullcontext()
    return gpus.one_reserved(study.machine.jobs_per_gpu)


def add_cell(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cell",
        required=True,
        metavar="KEY",
        help="dataset/arch/method/objective/s0.NNNN/seedN; `plan` prints it",
    )


def add_selection(command: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    command.add_argument(
        "--selection",
        default="best_val",
        choices=get_args(Selection),
        help="which saved weights (default: %(default)s)",
    )


def load_study(arguments: argparse.Namespace) -> tuple[Study, Layout]:
    return _with_layout(arguments, loading.load(arguments.config))


def load_cell(arguments: argparse.Namespace) -> tuple[Study, Layout, Cell]:
    """Load a study for a command on one of its cells; the other cells are not even listed."""
    study, layout = _with_layout(arguments, loading.load(arguments.config, whole=False))
    cell = Cell.parse(arguments.cell)
    if cell not in study.planned:
        keys = [other.key for other in study.cells()]
        raise UsageError(
            f"cell '{arguments.cell}' is not part of the study '{study.study}'"
            f"{nearest_match(arguments.cell, keys)}"
        )
    loading.check_cell(study, cell, arguments.config)
    return study, layout, cell


def _with_layout(arguments: argparse.Namespace, study: Study) -> tuple[Study, Layout]:
    return study, Layout(getattr(arguments, "results", Path("results")) / study.study)
