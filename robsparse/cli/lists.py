"""Commands that say what there is and what a config may hold: list and schema."""

import argparse
import ast
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import write_text
from robsparse.cli.arguments import Command
from robsparse.study import loading

_KINDS = {"methods": "method", "attacks": "attack", "datasets": "dataset", "archs": "arch"}
_STUDIES = "studies"


def _add_list(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "kind",
        nargs="?",
        choices=(*_KINDS, _STUDIES),
        metavar="KIND",
        help=f"{', '.join(_KINDS)} or {_STUDIES} (default: all)",
    )
    command.add_argument(
        "--config-dir",
        type=Path,
        default=Path("config"),
        metavar="DIR",
        help="folder of the study files (default: %(default)s)",
    )


def _list(arguments: argparse.Namespace) -> None:
    kinds = [arguments.kind] if arguments.kind else [*_KINDS, _STUDIES]
    for index, kind in enumerate(kinds):
        rows = [*(_studies(arguments.config_dir) if kind == _STUDIES else _parts(_KINDS[kind]))]
        if len(kinds) > 1:
            print(f"{chr(10) if index else ''}{kind}")
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            print(f"{name:{width}s}  {text}")


def _parts(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each registered part with the first sentence about its file."""
    for name in registry.names(kind):
        try:
            found = registry.entry(kind, name)
        except UsageError as error:
            yield name, f"damaged: {error}"
            continue
        text = ast.get_docstring(found.tree) or ""
        yield name, " ".join(text.split("\n\n")[0].split())


def _studies(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each study file with its title and the number of its networks."""
    for path in sorted(folder.glob("*.yaml")):
        try:
            study = loading.load(path)
        except UsageError as error:
            yield str(path), f"not valid: {str(error).splitlines()[0]}"
        else:
            yield str(path), f"{study.title} ({len(study.cells())} networks)"


def _add_schema(command: argparse.ArgumentParser) -> None:
    form = command.add_mutually_exclusive_group()
    form.add_argument(
        "--page", action="store_true", help="print the reference page of all keys in Markdown"
    )
    form.add_argument(
        "--write",
        action="store_true",
        help="write config/schema.json and docs/config.md in this folder",
    )


def _schema(arguments: argparse.Namespace) -> None:
    schema = importlib.import_module("robsparse.schema.json_schema").build()
    text = f"{json.dumps(schema, indent=1)}\n"
    page = importlib.import_module("robsparse.tools.config_page").page()
    if not arguments.write:
        print(page if arguments.page else text, end="")
        return
    for path, content in ((Path("config/schema.json"), text), (Path("docs/config.md"), page)):
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent}: no such folder; expected to run in the repository")
        write_text(path, content)
        print(f"written: {path}")


COMMANDS = (
    Command(
        "list",
        _list,
        "list the methods, attacks, data sets, archs and studies that there are",
        "Prints one line for each name. A config uses these names.",
        config="none",
        results=False,
        add_arguments=_add_list,
    ),
    Command(
        "schema",
        _schema,
        "print the JSON schema of a config",
        "Editors use it to complete keys and to mark wrong values. `check` finds more errors.",
        config="none",
        results=False,
        add_arguments=_add_schema,
    ),
)
