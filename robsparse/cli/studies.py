"""Commands on a study file: check and plan."""

import argparse
import importlib

from robsparse.base.errors import UsageError
from robsparse.cli.arguments import Command, load_study, positive
from robsparse.study import checks


def _check(arguments: argparse.Namespace) -> None:
    study, _ = load_study(arguments)
    if missing := checks.missing_data(study):
        raise UsageError("\n".join(f"{arguments.config}: {line}" for line in missing))
    cells = study.cells()
    print(
        f"{arguments.config}: valid, {len(cells)} networks to train, "
        f"{len(cells) * len(study.evaluation.selections)} evaluations"
    )
    for line in study.left_out():
        print(line)


def _plan(arguments: argparse.Namespace) -> None:
    study, layout = load_study(arguments)
    planning = importlib.import_module("robsparse.tools.planning")
    print(planning.describe(study, layout, arguments.cores))


def add_cores(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cores",
        type=positive,
        default=2,
        metavar="N",
        help="cores that jobs may share (default: %(default)s)",
    )


COMMANDS = (
    Command(
        "check",
        _check,
        "validate a config",
        "Each error is one line with file, key, value, what was expected and the nearest match.",
        results=False,
    ),
    Command(
        "plan",
        _plan,
        "list the jobs of a study and estimate their time",
        "Measures passes of the study's networks on this machine for a few seconds. Shows which "
        "jobs are done.",
        add_arguments=add_cores,
    ),
)
