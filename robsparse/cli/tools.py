"""Commands without a study: new-method and bench."""

import argparse
import importlib
from pathlib import Path

from robsparse.cli.arguments import Command, positive

_CASES = ("train", "perturb", "evaluate", "sparse", "rewire", "data", "together", "inference")


def _add_new_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="name of the file and of the method")
    command.add_argument(
        "--label", metavar="TEXT", help="name in tables and plots (default: derived from NAME)"
    )


def _new_method(arguments: argparse.Namespace) -> None:
    scaffold = importlib.import_module("robsparse.tools.scaffold")
    print(scaffold.new_method(arguments.name, arguments.label))


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("case", choices=_CASES, help="what to measure")
    command.add_argument(
        "--arch",
        action="append",
        metavar="NAME",
        help="architecture; may be repeated (default: small_cnn and resnet18)",
    )
    command.add_argument(
        "--precision",
        action="append",
        choices=("auto", "fp32", "tf32", "bf16"),
        help="precision of this suite; may be repeated (default: fp32 and auto)",
    )
    command.add_argument(
        "--only", default="", metavar="TEXT", help="run only cases with this text in their names"
    )
    options = {
        "--batch-size": (32, "images in a step"),
        "--images": (8, "images for AutoAttack"),
        "--repeats": (5, "measurements for the median"),
        "--threads": (1, "CPU threads"),
    }
    command.add_argument(
        "--size",
        type=int,
        choices=(8, 32),
        default=0,
        help="pixels of a side of the images (default: 8 for the small networks, otherwise 32)",
    )
    for name, (default, text) in options.items():
        command.add_argument(
            name, type=positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the rows to this file"
    )


def _bench(arguments: argparse.Namespace) -> None:
    bench = importlib.import_module("robsparse.tools.bench")
    settings = bench.settings_of(
        arguments.arch or ["small_cnn", "resnet18"],
        arguments.precision or ["fp32", "auto"],
        device=arguments.device,
        threads=arguments.threads,
        batch_size=arguments.batch_size,
        images=arguments.images,
        repeats=arguments.repeats,
        only=arguments.only,
        size=arguments.size,
    )
    print(bench.run(arguments.case, settings, arguments.json))


COMMANDS = (
    Command(
        "new-method",
        _new_method,
        "write the file of a new method from the template",
        "Writes baselines/NAME.py, a complete method with empty hooks.",
        config="none",
        results=False,
        add_arguments=_add_new_method,
    ),
    Command(
        "bench",
        _bench,
        "measure this suite against textbook code and the machine",
        "Runs both alternately in one process after a warm-up and compares their medians. Also "
        "compares this suite with the arithmetic peak of the machine.",
        config="none",
        results=False,
        add_arguments=_add_bench,
    ),
)
