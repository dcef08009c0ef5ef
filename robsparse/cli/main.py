"""The command line: check, plan, train, evaluate, collect, figures, export, new-method, bench.

Exit codes: 0 done, 1 a run failed, 2 bad input (one line says what), 75 stopped by a signal and
ready to be resumed, 130 stopped by Ctrl-C (resumable too). Torch is imported only by the commands
that need it.
"""

import argparse
import sys
from pathlib import Path

from robsparse import __version__
from robsparse.base.errors import RunError, UsageError
from robsparse.cli import evaluate, results, studies, tools, train
from robsparse.cli.arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Command

COMMANDS: tuple[Command, ...] = (
    *studies.COMMANDS,
    *train.COMMANDS,
    *evaluate.COMMANDS,
    *results.COMMANDS,
    *tools.COMMANDS,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"robsparse: error: {line}", file=sys.stderr)
        return EXIT_USAGE
    except RunError as error:
        print(f"robsparse: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:  # a full disk, say; files are renamed only when they are whole
        print(f"robsparse: error: {error}; nothing half-written is left", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("robsparse: stopped; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robsparse",
        description="Train, attack and compare sparse robust networks.",
        epilog="`snakemake --cores N` calls these commands for a whole study.",
    )
    parser.add_argument("--version", action="version", version=f"robsparse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        _add(
            command,
            commands.add_parser(
                command.name,
                help=command.text,
                description=f"{command.text[0].upper()}{command.text[1:]}. {command.detail}",
                epilog="Exit codes: 0 done, 1 the run failed, 2 bad input, 75 or 130 stopped by a "
                "signal (the same command continues).",
            ),
        )
    return parser


def _add(command: Command, parser: argparse.ArgumentParser) -> None:
    """Give the parser of a command its arguments."""
    parser.set_defaults(run=command.run)
    if command.config != "none":
        parser.add_argument(
            "config",
            metavar="CONFIG",
            nargs="?" if command.config == "optional" else None,
            help="study file, e.g. config/quick.yaml",
        )
    if command.add_arguments:
        command.add_arguments(parser)
    if command.results:
        parser.add_argument(
            "--results",
            type=Path,
            default=Path("results"),
            metavar="DIR",
            help="folder that holds the folder of each study (default: %(default)s)",
        )
