"""Finds the source code that decides a result: a module and all modules that it imports.

Imports are read from the text of the files; nothing is imported. Modules that the registry loads by
name are not found in this way. The caller lists the modules of methods, attacks, data sets and
archs that a cell uses.
"""

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "robsparse"
NATIVE = ("*.c", "*.h")  # sources of compiled modules

Import = tuple[int, str, tuple[str, ...]]  # level, module and names, as in ast.ImportFrom


@dataclass(frozen=True)
class Source:
    """The digest and the imports of one file. Comments, docstrings and layout do not change it."""

    digest: str
    imports: tuple[Import, ...]


def read(path: Path) -> bytes:
    """The text of a source file. All other functions read source files with this one."""
    return path.read_bytes()


@functools.cache
def digest(*entries: str, beside: tuple[str, ...] = ()) -> str:
    """Digest of the source code of the modules `entries` and of all modules that they import.

    C files in the folders of these modules count too, with their comments. The result of the first
    call is stored, because the process keeps the code that it has loaded.

    Args:
        entries: names of modules.
        beside: patterns of other files that count, in the folders of the modules: "*.mplstyle".
    """
    files = closure(*entries)
    sums = {name: _source(path).digest for name, path in files.items()}
    for folder in {path.parent for path in files.values()}:
        found = (path for pattern in (*NATIVE, *beside) for path in folder.glob(pattern))
        sums |= {path.name: hashlib.sha256(read(path)).hexdigest() for path in found}
    text = "\n".join(f"{name} {value}" for name, value in sorted(sums.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def closure(*entries: str) -> dict[str, Path]:
    """Files, by module name, of the modules `entries` and all modules that they import.

    Parent packages are included. Imports are followed inside this package, inside the package of an
    entry, and to modules in the same folder as that package. Installed libraries are left out.

    Raises:
        LookupError: if an entry of this package has no file. Without it, a wrong name would give a
            digest that never changes.
    """
    for entry in entries:
        if entry.partition(".")[0] == PACKAGE and locate(entry) is None:
            raise LookupError(f"{entry}: there is no such module")
    found: dict[str, Path] = {}
    waiting = [name for entry in entries for name in _with_parents(entry)]
    while waiting:
        module = waiting.pop()
        path = locate(module)
        if module in found or path is None:
            continue
        found[module] = path
        waiting += _imported(module, path)
    return found


@functools.cache
def _imported(module: str, path: Path) -> list[str]:
    """The modules that a module imports, with parent packages and without installed libraries."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: dict[str, None] = {}
    for level, base, names in _source(path).imports:
        if level:
            above = package.split(".")[: package.count(".") + 2 - level]
            base = ".".join([*above, base] if base else above)  # noqa: PLW2901
        if _is_ours(base, module):
            found |= dict.fromkeys([*_with_parents(base), *(f"{base}.{name}" for name in names)])
    return [name for name in found if locate(name) is not None]


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_ours(module: str, importer: str) -> bool:
    """Whether a module is in this package, or is code of the user like its importer."""
    top, own = module.partition(".")[0], importer.partition(".")[0]
    if top in (PACKAGE, own) or own == PACKAGE or top in sys.stdlib_module_names:
        return top in (PACKAGE, own)
    home = _home(top)
    return home is not None and home == _home(own) and home.name != "site-packages"


def _home(top: str) -> Path | None:
    """The folder of a top-level package or module."""
    path, folders = _places(top)
    if folders:
        return folders[0].parent
    return path.parent if path else None


def locate(module: str) -> Path | None:
    """The source file of a module; None if there is none."""
    return _places(module)[0]


@functools.cache
def _places(module: str) -> tuple[Path | None, tuple[Path, ...]]:
    """The file of a module and, if it is a package, the folders of its modules.

    This imports only the package robsparse, which is an empty file.
    """
    parent, _, name = module.rpartition(".")
    if parent not in ("", PACKAGE):
        spec = importlib.machinery.PathFinder.find_spec(name, [*map(str, _places(parent)[1])])
    else:
        spec = _spec(module)
    if spec is None:
        return None, ()
    folders = tuple(map(Path, spec.submodule_search_locations or ()))
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None, folders
    return Path(spec.origin), folders


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """The place where Python finds a module; the current folder is searched too."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    return found or importlib.machinery.PathFinder.find_spec(module, [str(Path.cwd())])


@functools.cache
def _source(path: Path) -> Source:
    written: list[str] = []
    imports: list[Import] = []
    _write(ast.parse(read(path), str(path)), written, imports)
    text = "\x1f".join(written).encode(errors="surrogatepass")
    return Source(hashlib.sha256(text).hexdigest(), tuple(dict.fromkeys(imports)))


def _write(node: Any, written: list[str], imports: list[Import]) -> None:
    """Add a syntax tree to `written`, and its imports to `imports`.

    Positions, docstrings and empty fields are left out.
    """
    if isinstance(node, list):
        written.append("[")
        for item in node:
            if not _is_text(item):
                _write(item, written, imports)
        written.append("]")
    elif isinstance(node, ast.AST):
        if isinstance(node, _IMPORTING):
            imports += _imports_of(node)
        written += (type(node).__name__, "(")
        for name in node._fields:
            value = getattr(node, name, None)
            if name != "ctx" and value is not None and value != []:
                written.append(name)
                _write(value, written, imports)
        written.append(")")
    else:
        written.append(repr(node))


def _is_text(node: Any) -> bool:
    """Whether a statement is only a string, for example a docstring."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


_IMPORTING = (ast.Import, ast.ImportFrom, ast.Call)


def _imports_of(node: ast.Import | ast.ImportFrom | ast.Call) -> list[Import]:
    if isinstance(node, ast.Import):
        return [(0, alias.name, ()) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.level, node.module or "", tuple(alias.name for alias in node.names))]
    called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
    if called == "import_module" and node.args:
        name = getattr(node.args[0], "value", None)
        return [(0, name, ())] if isinstance(name, str) else []
    return []
