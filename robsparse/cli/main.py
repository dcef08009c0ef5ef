"""The command line. Each module of this package has one group of commands.

Exit codes: 0 done, 1 a run failed, 2 bad input (one line describes it), 75 stopped by a signal, 130
stopped by Ctrl-C. After 75 or 130 the same command continues the run. Only commands that need torch
import it.
"""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from robsparse import __version__
from robsparse.base.errors import RunError, UsageError
from robsparse.base.parent import end_with_parent
from robsparse.cli import evaluate, lists, results, studies, tools, train
from robsparse.cli.arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Command

COMMANDS: tuple[Command, ...] = (
    *lists.COMMANDS,
    *studies.COMMANDS,
    *train.COMMANDS,
    *evaluate.COMMANDS,
    *results.COMMANDS,
    *tools.COMMANDS,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    end_with_parent()
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has ended, as in `robsparse list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return EXIT_FAILED
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except RunError as error:
        return _fail(str(error), EXIT_FAILED)
    except OSError as error:  # a file gets its name only when it is complete
        return _fail(f"{error}; no incomplete file is left", EXIT_FAILED)
    except KeyboardInterrupt:
        print("robsparse: stopped; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED


def _fail(message: str, code: int) -> int:
    """Print an error, each line with the name of the program; return the exit code."""
    with suppress(OSError):  # the log may be on the same full disk
        for line in message.splitlines():
            print(f"robsparse: error: {line}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robsparse",
        description="Train, attack and compare sparse robust networks.",
        epilog="`robsparse run CONFIG` and `snakemake` call these commands for a whole study.",
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
    """Add the arguments of a command to its parser."""
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
            help="folder with one folder for each study (default: %(default)s)",
        )
