"""Finds methods, attacks, data sets and architectures by listing files, without importing them.

Each file is one part: `baselines/lwm.py` is the method `lwm`. A file with several parts lists their
names in a literal `NAMES`. An installed package adds a method with an entry point of the group
`robsparse.methods`; the value of the entry point is the module. Names, literals and the `Params`
model are read from the source text; the function `load` imports the module.

Reading the text has two advantages. Checking a config and planning a workflow take much less time
than loading torch. A file that cannot be imported affects only studies that use it. The
disadvantage is that a `Params` class may use only a few imports (see _PARAMS_IMPORTS).
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

# A Params model may import only from these modules, so that it can be read without importing torch.
_PARAMS_IMPORTS = ("typing", "pydantic", "robsparse.schema")


_MAY = f"parameter classes may use only literals and names from {', '.join(_PARAMS_IMPORTS)}"


@dataclass(frozen=True)
class Entry:
    """One registered name, with the facts that are read from its source text.

    literals: the top-level constants of the module (LABEL, STARTS_FROM, ...).
    tree: the parsed text.
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
        """Return an error that the code of this part raised, in one line with file and line."""
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(self.path)
        ]
        where = f"{self.path}, line {lines[-1]}" if lines else str(self.path)
        return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"


def names(kind: str) -> list[str]:
    """Return all registered names of a kind ("method", "attack", "dataset", "arch"), sorted."""
    return sorted(_entries(kind))


def entry(kind: str, name: str, also: Iterable[str] = ()) -> Entry:
    """Return the entry with a name.

    Args:
        kind: "method", "attack", "dataset" or "arch".
        name: name of the part.
        also: more names that the error message lists and searches for the nearest match.

    Raises:
        UsageError: if there is no such entry, or if its file is damaged or has no class Params. A
            damaged file does not affect other entries.
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
    _ = item.params  # raises UsageError if the file has no class Params
    return item


def load(kind: str, name: str) -> ModuleType:
    """Import and return the module of an entry.

    Raises:
        UsageError: if the module cannot be imported, or if a method has no function `stages`. The
            message names the file and the reason.
    """
    found = entry(kind, name)
    try:
        module = importlib.import_module(found.module)
    except Exception as error:
        raise UsageError(found.describe_error(error)) from error
    if kind == "method" and not callable(getattr(module, "stages", None)):
        raise UsageError(
            f"{found.path}: no function stages(params), expected one that returns the stages"
        )
    return module


@functools.cache
def _entries(kind: str) -> dict[str, Entry | UsageError]:
    """Return all entries of a kind by name; a damaged file has an error in place of its entry."""
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
    """Yield module, file and, for an entry point, name of each file."""
    for package in PACKAGES[kind]:
        spec = importlib.util.find_spec(package)
        folders = list((spec.submodule_search_locations if spec else None) or [])
        for path in sorted(path for folder in folders for path in Path(folder).glob("*.py")):
            if not path.stem.startswith("_"):
                yield f"{package}.{path.stem}", path, None
    if kind not in ENTRY_POINTS:
        return
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS[kind]):
        try:
            spec = importlib.util.find_spec(point.module)
        except Exception:  # its package is imported here and can raise anything
            spec = None
        yield point.module, Path(spec.origin if spec and spec.origin else point.module), point.name


def _read(kind: str, module: str, path: Path, name: str | None) -> list[Entry]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError:
        raise UsageError(
            f"{path}: no such file; the {kind} '{name}' of an installed package needs it"
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
    """Build the class `Params` of a module without executing the whole file.

    Only imports from _PARAMS_IMPORTS and classes that derive from pydantic models are executed. The
    imports of torch are not. Validators of the classes can therefore use no other names.
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
    """Execute an import or a class; return the global names in its functions, with lines."""
    code = compile(ast.Module([node], []), str(path), "exec")
    try:
        exec(code, space)
    except Exception as error:
        raise UsageError(
            f"{path}: line {node.lineno}: {type(error).__name__}: {error}; {_MAY}"
        ) from None
    return list(_globals_of(code, node.lineno))


def _globals_of(code: CodeType, line: int) -> Iterator[tuple[str, int]]:
    """Yield the global names that code and its inner functions use, with lines.

    The functions run later, so an unknown name would be noticed late.
    """
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
