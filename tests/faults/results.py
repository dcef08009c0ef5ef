"""What a study has produced, without times; and the counts of the harness."""

import contextlib
import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from faults.commands import ROOT, Ended

SKIPPED = {"logs", "resume", "partial"}  # folders without results
PLAIN = (".md", ".tex", ".png", ".pdf", ".txt")
COLUMNS = ("cases", "one line", "no effect", "unnamed", "traceback", "lost or different")


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_DIGESTS = _module(ROOT / "benchmarks" / "digests.py")


def contents(folder: Path) -> dict[str, str]:
    """Name -> digest of every result in the folder of a study: tensors, arrays, columns, texts."""
    found: dict[str, str] = _DIGESTS.digests(folder)
    for path in sorted(folder.rglob("*.json")):
        if path.name != "collected.json":  # it has checksums of tables with times
            content = json.dumps(_without_times(json.loads(path.read_text())))
            found[str(path.relative_to(folder))] = hashlib.sha256(content.encode()).hexdigest()
    for path in sorted(folder.rglob("*")):
        if path.suffix in PLAIN and path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {n: d for n, d in found.items() if not SKIPPED & {*Path(n.split(" ")[0]).parts[:1]}}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = _DIGESTS.VARY | {"checksum"}
        return {key: _without_times(v) for key, v in value.items() if key not in left_out}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def leftovers(folder: Path) -> list[str]:
    """Temporary files that a command has left."""
    return [str(path) for path in folder.rglob(".*.*") if path.is_file()]


@dataclass
class Counts:
    """Counts by name of the fault, and a line for each case that is wrong.

    Columns: all cases; errors of one line that name the file; cases without an effect on any
    result (the file is not read, or what it had is computed again); errors that do not name the
    file; tracebacks and crashes; results that are lost or differ.
    """

    rows: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, column: str, detail: str = "") -> None:
        """Count a case."""
        row = self.rows.setdefault(name, Counter())
        row["cases"] += 1
        row[column] += 1
        if column in COLUMNS[3:]:
            self.wrong.append(f"{name}: {column}: {detail}")
            print(self.wrong[-1], flush=True)

    def join(self, other: "Counts") -> None:
        """Add the counts of another part, and print its table."""
        print(other.table(), flush=True)
        self.rows |= other.rows
        self.wrong += other.wrong

    def judge(self, name: str, ended: Ended, file: str, wrong: list[str]) -> None:
        """Count a command that met a damaged file or a full disk.

        Args:
            name: of the fault.
            ended: the command.
            file: a part of the path that an error must name.
            wrong: what is lost, or differs from the results of an undisturbed command.
        """
        text = f"{' '.join(ended.words)}: code {ended.code}: {(ended.out + ended.err)[-1500:]}"
        if ended.crashed or ended.code not in (0, 1, 2):
            self.add(name, "traceback", text)
        elif wrong:
            self.add(name, "lost or different", f"{wrong[:5]} {text}")
        elif ended.code == 0:
            self.add(name, "no effect")
        elif any(file in line for line in ended.errors):
            self.add(name, "one line")
        else:
            self.add(name, "unnamed", text)

    def table(self) -> str:
        """The counts as a table in Markdown, with a line for the sum."""
        total: Counter[str] = sum(self.rows.values(), Counter())
        lines = [f"| fault | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
        for name, row in [*self.rows.items(), ("**all**", total)]:
            lines.append(f"| {name} | {' | '.join(f'{row[c]:,}' for c in COLUMNS)} |")
        return "\n".join(lines)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C end a part of the harness; its counts so far are kept."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped: the counts are those so far", flush=True)


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of results that are gone or differ."""
    return [name for name, digest in expected.items() if found.get(name) != digest]
