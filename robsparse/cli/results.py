"""Commands on finished records: collect, figures, compare and export."""

import argparse
import importlib
from pathlib import Path
from typing import get_args

from robsparse.cli.arguments import (
    EXIT_FAILED,
    Command,
    add_cell,
    add_selection,
    load_cell,
    load_study,
)
from robsparse.schema.evaluation import Selection

_FORMATS = ("compact", "onnx", "robustbench")


def add_partial(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--partial",
        action="store_true",
        help="use the results that exist if networks are missing or failed; write to "
        "DIR/STUDY/partial",
    )


def _collect(arguments: argparse.Namespace) -> None:
    study, layout = load_study(arguments)
    collection = importlib.import_module("robsparse.collection.collect")
    print(collection.collect(study, layout, layout.tables(arguments.partial)))


def _figures(arguments: argparse.Namespace) -> None:
    study, layout = load_study(arguments)
    report = importlib.import_module("robsparse.figures.report")
    print(report.write(study, layout, layout.tables(arguments.partial)))


def _add_compare(command: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        command.add_argument(
            name, type=Path, metavar=name.upper(), help="folder with results.csv of a run"
        )
    command.add_argument(
        "--selection",
        choices=get_args(Selection),
        help="which saved weights (default: the first selection of A)",
    )
    command.add_argument(
        "--all",
        action="store_true",
        help="print every attack; else, of each row the attack that is most apart",
    )


def _compare(arguments: argparse.Namespace) -> int:
    module = importlib.import_module("robsparse.figures.data.agreement")
    found = module.agreement(arguments.a, arguments.b, arguments.selection)
    print(found.text(every=arguments.all))
    return 0 if found.holds else EXIT_FAILED


def _add_export(command: argparse.ArgumentParser) -> None:
    add_cell(command)
    add_selection(command)
    command.add_argument(
        "--format",
        action="append",
        default=[],
        choices=_FORMATS,
        help="may be repeated (default: compact, and onnx if its libraries are installed)",
    )


def _export(arguments: argparse.Namespace) -> None:
    study, layout, cell = load_cell(arguments)
    export = importlib.import_module("robsparse.tools.export")
    one = export.Exported(study, cell, arguments.selection, layout)
    for line in export.export(one, arguments.format):
        print(line)


COMMANDS = (
    Command(
        "collect",
        _collect,
        "gather all records into one table",
        "Checks them and writes results.csv, results.parquet, layers.csv, curves.csv and "
        "steps.parquet to DIR/STUDY. Lists missing records.",
        add_arguments=add_partial,
    ),
    Command(
        "figures",
        _figures,
        "draw tables and plots from the collected results",
        "Writes report.md, report.html, tables/ and plots/ to DIR/STUDY.",
        add_arguments=add_partial,
    ),
    Command(
        "compare",
        _compare,
        "compare two runs: which rows agree within their intervals",
        "A row is a method at a sparsity. It agrees if the interval of the difference A - B "
        "contains 0 for every attack. Differences are paired by seed and image. Exit code: 0 if "
        "every row of both runs agrees, else 1.",
        config="none",
        results=False,
        add_arguments=_add_compare,
    ),
    Command(
        "export",
        _export,
        "write a network for use elsewhere: a compact file, ONNX, RobustBench",
        "Writes to DIR/STUDY/export/KEY: SELECTION.compact.safetensors, the nonzero weights, which "
        "robsparse.load opens in Python; SELECTION.onnx; and for RobustBench "
        "SELECTION.model_info.json with SELECTION.safetensors.",
        add_arguments=_add_export,
    ),
)
