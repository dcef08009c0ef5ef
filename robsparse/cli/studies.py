"""Commands on a study file: check, plan and run."""

import argparse
import importlib
from pathlib import Path

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
    for line in (*study.left_out(), *checks.absent_folders(study)):
        print(line)


def _plan(arguments: argparse.Namespace) -> None:
    study, layout = load_study(arguments)
    planning = importlib.import_module("robsparse.tools.planning")
    print(planning.describe(study, layout, arguments.cores, arguments.config))


def add_cores(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cores",
        type=positive,
        default=2,
        metavar="N",
        help="cores that jobs may share (default: %(default)s)",
    )


def _cores(text: str) -> str:
    return text if text == "all" else str(positive(text))


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cores",
        type=_cores,
        default="all",
        metavar="N",
        help="cores that jobs may share, or all; with --executor, jobs at a time "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="KEY=VALUE",
        help="change a setting, e.g. evaluation.n_examples=50 or grid.seeds=[0]; may be repeated. "
        "The changed study is written to results/STUDY/config.yaml, and its results replace those "
        "of the study, unless study=NAME is changed too",
    )
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="AXIS=VALUES",
        help="attack only some networks, e.g. method=bcs,lwm or seed=0; may be repeated. Networks "
        "that they start from are trained too. The report is in results/STUDY/partial",
    )
    command.add_argument(
        "--executor", metavar="NAME", help="executor plugin of snakemake, e.g. slurm"
    )
    command.add_argument(
        "further",
        nargs="*",
        metavar="-- OPTION",
        help="further options of snakemake, after --, e.g. -- --rerun-triggers mtime",
    )


def _run(arguments: argparse.Namespace) -> int:
    workflow = importlib.import_module("robsparse.tools.workflow")
    return int(
        workflow.run(
            Path(arguments.config),
            cores=arguments.cores,
            changes=arguments.changes,
            only=arguments.only,
            executor=arguments.executor,
            further=arguments.further,
        )
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
    Command(
        "run",
        _run,
        "train, attack and report a study",
        "Calls snakemake in the folder of the repository, like `snakemake --cores N --configfile "
        "CONFIG`, and shows one progress display. At the end it prints the table, or the error of "
        "each failed job, and names the report.",
        results=False,
        add_arguments=_add_run,
    ),
)
