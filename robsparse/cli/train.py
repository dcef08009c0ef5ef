"""The command that trains one network."""

import argparse
import importlib
import signal
import sys

from robsparse.cli.arguments import (
    EXIT_INTERRUPTED,
    EXIT_RESUME,
    Command,
    add_cell,
    add_machine,
    load_cell,
    reserved_gpu,
)


def _add_train(command: argparse.ArgumentParser) -> None:
    add_cell(command)
    add_machine(command)


def _train(arguments: argparse.Namespace) -> int:
    study, layout, cell = load_cell(arguments)
    training = importlib.import_module("robsparse.training.loop")
    checkpoints = importlib.import_module("robsparse.training.checkpoints")
    options = {"device": arguments.device, "threads": arguments.threads}
    try:
        with reserved_gpu(arguments, study):
            training.train_cell(study, cell, layout, **options)
    except checkpoints.Interrupted as stopped:
        print(f"robsparse: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED if stopped.signum == signal.SIGINT else EXIT_RESUME
    return 0


COMMANDS = (
    Command(
        "train",
        _train,
        "train one cell",
        "Writes best_val.safetensors, last.safetensors, training.json and steps.parquet to "
        "DIR/STUDY/models/KEY; also best_clean.safetensors if the study attacks it. An interrupted "
        "run continues from DIR/STUDY/resume/KEY and gives the same bits.",
        add_arguments=_add_train,
    ),
)
