"""Finds methods, attacks, datasets and architectures by listing files, without importing them.

A file is the unit: `baselines/lwm.py` is the method `lwm`. A file may hold several names when it
says so in a literal `NAMES`. An installed package adds a method by an entry point of the group
`robsparse.methods` whose value is the module. What the workflow must know before torch is loaded
(the names, the literals and the `Params` model) is read from the source text; `load` imports the
module for real.

Why the text is read, and not the module imported: a config is checked and a workflow is planned in
a fraction of the time that torch takes to load, and a file that cannot be imported does not stop
those who do not use it. The price is that a `Params` class may use few names (see _PARAMS_IMPORTS).
"""

import ast
import builtins
import dis
import functools
import importlib
import importlib.metadata
import importlib.util
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from pydantic import BaseModel

from robsparse.base.errors import UsageError, nearest_match, shortened

ENTRY_POINTS = {"method": "robsparse.methods"}
PACKAGES = {
    "method": ("robsparse.method", "robsparse.baselines"),
    "attack": ("robsparse.eval",),
    "dataset": ("robsparse.datasets",),
    "arch": ("robsparse.models",),
}

# A Params model may be built from these alone, so that it can be read without importing torch.
_PARAMS_IMPORTS = ("typing", "pydantic", "robsparse.schema")


_MAY = f"parameter classes may use literals and names from {', '.join(_PARAMS_IMPORTS)} alone"


@dataclass(frozen=True)
class Entry:
    """One registered name and what its source text says of it.

    `literals` holds the module's top-level constants (LABEL, STARTS_FROM, ...); `tree` is the
    parsed text.
    """

    kind: str
    name: str
    module: str
    path: Path
    literals: dict[str, Any]
    tree: ast.Module = field(repr=False, compare=False)

    @functools.cached_property
    def params(self) -> type[BaseModel]:
        """The pydantic model of parameters, with defaults. Raises UsageError if there is none."""
        return _params(self.tree, self.module, self.path)

    def describe_error(self, error: Exception) -> str:
        """In one line, what its code raised, and in which line of its file."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(self.path)
        ]
        where = f"{self.path}, line {lines[-1]}" if lines else str(self.path)
        return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def names(kind: str) -> list[str]:
    """All registered names of a kind ("method", "attack", "dataset", "arch"), sorted."""
    return sorted(_entries(kind))


def entry(kind: str, name: str, also: Iterable[str] = ()) -> Entry:
    """The entry called `name`.

    Raises UsageError with the nearest match, `also` among the candidates, when there is none, and
    when its file lacks a part. A file that cannot be read stops only those who ask for its names.
    """
    found = _entries(kind)
    if name not in found:
        known = sorted({*found, *also})
        raise UsageError(
            f"unknown {kind} '{shortened(name)}', expected one of: {', '.join(known)}"
            f"{nearest_match(name, known)}"
        )
    item = found[name]
    if isinstance(item, UsageError):
        raise item
    _ = item.params  # raises where the file has none
    return item


def load(kind: str, name: str) -> ModuleType:
    """Import and return the module that holds `name`.

    Raises UsageError, naming file and reason, when it cannot be imported or lacks a part.
    """
    found = entry(kind, name)
    try:
        module = importlib.import_module(found.module)
    except Exception as error:
        raise UsageError(found.describe_error(error)) from error
    if kind == "method" and not callable(getattr(module, "stages", None)):
        raise UsageError(
            f"{found.path}: no function stages(params), expected it to return the stages"
        )
    return module


@functools.cache
def _entries(kind: str) -> dict[str, Entry | UsageError]:
    """Everything registered; in the place of a file that cannot be read, the error about it."""
    found: dict[str, Entry | UsageError] = {}
    for module, path, name in _files(kind):
        try:
            items: list[Entry | UsageError] = [*_read(kind, module, path, name)]
        except UsageError as error:
            items = [error]
        for item in items:
            own = item.name if isinstance(item, Entry) else name or path.stem
            if own in found:
                other = found[own]
                taken = other.path if isinstance(other, Entry) else "another file"
                item = UsageError(f"{path}: the {kind} '{own}' is already taken by {taken}")  # noqa: PLW2901
            found[own] = item
    return found


def _files(kind: str) -> Iterator[tuple[str, Path, str | None]]:
    """Module, file and (for an entry point) name of everything registered."""
    for package in PACKAGES[kind]:
        spec = importlib.util.find_spec(package)
        folders = list((spec.submodule_search_locations if spec else None) or [])
        for path in sorted(path for folder in folders for path in Path(folder).glob("*.py")):
            if not path.stem.startswith("_"):
                yield f"{package}.{path.stem}", path, None
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS.get(kind, "")):
        try:
            spec = importlib.util.find_spec(point.module)
        except Exception:  # whatever the package that holds it does when it is imported
            spec = None
        yield point.module, Path(spec.origin if spec and spec.origin else point.module), point.name


def _read(kind: str, module: str, path: Path, name: str | None) -> list[Entry]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError:
        raise UsageError(
            f"{path}: the {kind} '{name}' of an installed package is not there"
        ) from None
    except SyntaxError as error:
        raise UsageError(f"{path}: line {error.lineno}: {error.msg}") from None
    except (ValueError, MemoryError, RecursionError) as error:  # null bytes, deep nesting
        raise UsageError(f"{path}: expected Python source ({error})") from None
    literals = _literals(tree)
    registered = (name,) if name else literals.get("NAMES", (path.stem,))
    if not isinstance(registered, tuple | list) or not all(isinstance(n, str) for n in registered):
        raise UsageError(f"{path}: NAMES = {registered!r}: expected a tuple of names")
    return [Entry(kind, own, module, path, literals, tree) for own in registered]


def _literals(tree: ast.Module) -> dict[str, Any]:
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        elif isinstance(node, ast.AnnAssign):
            target = node.target
        else:
            continue
        if isinstance(target, ast.Name) and node.value is not None:
            try:
                values[target.id] = ast.literal_eval(node.value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    return values


def _params(tree: ast.Module, module: str, path: Path) -> type[BaseModel]:
    """Build the module's `Params` from its pydantic classes alone.

    Only imports from _PARAMS_IMPORTS, and classes that derive from pydantic models, are executed:
    the rest of the file, torch included, is not. Their validators may therefore use no other names
    either.
    """
    space: dict[str, Any] = {"__name__": module}
    used: list[tuple[str, int]] = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            wanted = node.module in _PARAMS_IMPORTS
        else:
            wanted = isinstance(node, ast.ClassDef) and _derives_from_model(node, space)
        if wanted:
            used += _execute(node, space, path)
    if "Params" not in space:
        raise UsageError(
            f"{path}: no class Params found (expected a robsparse.schema.Strict model)"
        )
    for name, line in used:
        if name not in space and not hasattr(builtins, name):
            raise UsageError(f"{path}: line {line}: the name '{name}' is not known here; {_MAY}")
    return space["Params"]


def _execute(node: ast.stmt, space: dict[str, Any], path: Path) -> list[tuple[str, int]]:
    """Run an import or a class; returns the global names that its functions use, with lines."""
    code = compile(ast.Module([node], []), str(path), "exec")
    try:
        exec(code, space)
    except Exception as error:
        raise UsageError(
            f"{path}: line {node.lineno}: {type(error).__name__}: {error}; {_MAY}"
        ) from None
    return list(_globals_of(code, node.lineno))


def _globals_of(code: CodeType, line: int) -> Iterator[tuple[str, int]]:
    """Global names that code and the functions in it use: they may not run before much later."""
    for step in dis.get_instructions(code):
        line = (step.positions.lineno if step.positions else None) or line
        if step.opname == "LOAD_GLOBAL":
            yield step.argval, line
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner, inner.co_firstlineno)


def _derives_from_model(node: ast.ClassDef, space: dict[str, Any]) -> bool:
    bases = [space.get(base.id) for base in node.bases if isinstance(base, ast.Name)]
    return any(isinstance(base, type) and issubclass(base, BaseModel) for base in bases)
