"""Draws the layers of the package: packages from top to bottom, their size and what they import.

    python benchmarks/architecture.py

The layers are those of the contract in pyproject.toml, which `make test` checks. The imports are
read from the source text. The depth is the number of modules on the longest chain of imports.
"""

import ast
import functools
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTER = ("method", "baselines", "eval", "figures")


def modules() -> dict[str, Path]:
    """Module below robsparse (e.g. "study.cells") -> its file; a package by its own name."""
    found = {}
    for folder, start in [(ROOT / "robsparse", 1), *((ROOT / name, 0) for name in OUTER)]:
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts[start:]
            name = ".".join(parts).removesuffix("__init__").rstrip(".")
            if name and name != "__main__":
                found[name] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("robsparse"):
            base = (node.module or "").removeprefix("robsparse").lstrip(".")
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {name if name in known else base for name in names}
    return found - {""}


def depth(graph: dict[str, set[str]]) -> int:
    """The number of modules on the longest chain of imports. Raises RecursionError for a cycle."""

    @functools.cache
    def below(name: str) -> int:
        return 1 + max((below(other) for other in graph.get(name, ()) if other != name), default=0)

    return max(below(name) for name in graph)


def drawing() -> str:
    """The layers as text, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    [layers] = [c["layers"] for c in contracts if c["type"] == "layers"]
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    lines = [f"{'package':<12} {'files':>5} {'lines':>6}  imports"]
    for layer in layers:
        lines.append("-" * 88)
        for package in layer.split(" | "):
            own = {name: path for name, path in known.items() if name.split(".")[0] == package}
            length = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in own.values())
            used = {other.split(".")[0] for name in own for other in graph[name]} - {package}
            ordered = [p for other in layers for p in other.split(" | ") if p in used]
            files = sum(path.name != "__init__.py" for path in own.values())
            lines += _wrapped(f"{package:<12} {files:>5} {length:>6}  ", " ".join(ordered))
    lines.append("-" * 88)
    packages = {name.split(".")[0] for name in known}
    above = {
        package: {
            other.split(".")[0]
            for name, used in graph.items()
            if name.split(".")[0] == package
            for other in used
        }
        for package in packages
    }
    lines.append(
        f"{len(layers)} layers; longest chain of imports: {depth(above)} packages, "
        f"{depth(graph)} modules"
    )
    return "\n".join(lines)


def _wrapped(head: str, text: str, width: int = 88) -> list[str]:
    lines, current = [], head
    for word in text.split():
        if len(current) + len(word) > width:
            lines.append(current.rstrip())
            current = " " * len(head)
        current += f"{word} "
    return [*lines, current.rstrip()]


if __name__ == "__main__":
    print(drawing())
