"""Reads the collected tables, and lists the lines of the tables of a study.

Import path: robsparse.figures.data.tidy
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from robsparse.base.errors import UsageError, shortened
from robsparse.base.files import file_checksum, read_record, read_table
from robsparse.records.checked import Checked
from robsparse.records.checked import check as check_record
from robsparse.records.columns import (
    CORRUPTION_COLUMNS,
    LIFETIME_COLUMNS,
    MANIFEST,
    OVERLAP_COLUMNS,
    STEP_COLUMNS,
)
from robsparse.records.evaluation_record import read_flags
from robsparse.records.rows import Row, contradiction
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

GROUP = ["dataset", "arch", "objective"]
LINE = [*GROUP, "method", "sparsity"]
SEEDED = [*LINE, "seed"]
SEEDED_CELL = [field.name for field in dataclasses.fields(Cell)]

_COLUMNS = {
    "results.csv": [*Row.model_fields, "budget", "other_code"],
    "layers.csv": [*SEEDED, "selection", "layer", "size", "nonzero"],
    "curves.csv": [*SEEDED, "epoch", "stage", "active_weights"],
    "steps.parquet": [*SEEDED, *STEP_COLUMNS],
    "lifetimes.parquet": [*SEEDED, *LIFETIME_COLUMNS],
    "weights.csv": [*SEEDED, "selection", "low", "high", "count"],
    "overlap.csv": [*OVERLAP_COLUMNS],
    "failures.csv": [*SEEDED, "reason"],
    "sanity_checks.csv": [*SEEDED, "selection"],
    "corruptions.csv": [*SEEDED, "selection", *CORRUPTION_COLUMNS],
}
# Columns of results.csv that may be missing, and what a row then has in them.
_OPTIONAL = {
    name: field.default for name, field in Row.model_fields.items() if not field.is_required()
}
_WORDS = [
    "warnings",
    "potentially_unreliable",
    "failure",
    "budget",
    "origin",
    "other_code",
    "layer",
    "train_device",
    "eval_device",
    "version",
    "libraries",
    "kernels",
    # Digests may consist of digits alone, or look like 1e5.
    "code_version",
    "code_digest",
    "settings_digest",
    "data_checksum",
    "model_checksum",
]
_REMEDY = "run `robsparse collect CONFIG` again"
# Columns of words; all other columns have numbers.
_NUMBERS = (int, float, bool, int | None, float | None)
_TEXTS = {
    *(name for name, field in Row.model_fields.items() if field.annotation not in _NUMBERS),
    *_WORDS,
    *("stage", "reason", "corruption", "source"),
    *("method_a", "selection_a", "method_b", "selection_b"),
}


class _Manifest(Checked):
    tables: dict[str, str]
    outcomes: dict[str, str]


@dataclass(frozen=True, order=True)
class Group:
    """Networks in one table. They have the same data set, architecture and objective."""

    dataset: str
    arch: str
    objective: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.arch}, objective {self.objective}"

    def select(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of a tidy table that belong to this group."""
        wanted = (table.dataset == self.dataset) & (table.arch == self.arch)
        return table[wanted & (table.objective == self.objective)]


@dataclass(frozen=True)
class Tidy:
    """The collected tables. All but `results` may be empty."""

    results: pd.DataFrame
    layers: pd.DataFrame
    curves: pd.DataFrame
    steps: pd.DataFrame
    lifetimes: pd.DataFrame
    weights: pd.DataFrame
    overlap: pd.DataFrame
    failures: pd.DataFrame
    sanity_checks: pd.DataFrame
    corruptions: pd.DataFrame


def read(folder: Path) -> Tidy:
    """Read the collected tables of a study.

    Raises:
        UsageError: if results.csv is missing, or if a table is damaged or lacks a column.
    """
    if not (folder / "results.csv").exists():
        raise UsageError(
            f"{folder / 'results.csv'}: not there; run `robsparse collect CONFIG` first"
        )
    return Tidy(*(_table(folder / name) for name in _COLUMNS))


def check(tidy: Tidy, layout: Layout, folder: Path) -> None:
    """Raise UsageError if tables or outcomes were changed after `robsparse collect`.

    If a row of results.csv contradicts the outcomes of its images, the message names its column.
    """
    outcomes = functools.lru_cache(maxsize=1)(functools.partial(_flags, layout))
    for row in tidy.results.itertuples():
        cell = Cell(*(getattr(row, name) for name in SEEDED_CELL))
        if wrong := contradiction(row, outcomes(cell, row.selection)):
            raise UsageError(
                f"{folder / 'results.csv'}: row {row.Index + 2}, {cell.key} {row.selection} "
                f"{row.attack} {row.component}: {wrong}; run `robsparse collect CONFIG` again"
            )
    path = folder / MANIFEST
    manifest = read_record(path, lambda found: check_record(_Manifest, found, path, _REMEDY))
    sums = {folder / name: checksum for name, checksum in manifest.tables.items()}
    sums |= {layout.root / name: checksum for name, checksum in manifest.outcomes.items()}
    for path, checksum in sums.items():
        if not path.exists() or file_checksum(path) != checksum:
            raise UsageError(f"{path}: not as it was collected; {_REMEDY}")


def _table(path: Path) -> pd.DataFrame:
    columns = _COLUMNS[path.name]
    if not path.exists():
        return pd.DataFrame(columns=columns)
    if path.stat().st_size == 1:  # a table without columns
        return pd.DataFrame(columns=columns)
    words_as_text = {} if path.suffix == ".parquet" else {"dtype": dict.fromkeys(_WORDS, str)}
    table = read_table(path, _REMEDY, **words_as_text)
    if path.name == "results.csv":  # of an earlier version, e.g. a committed run
        table = table.assign(**{c: v for c, v in _OPTIONAL.items() if c not in table})
    missing = [column for column in columns if column not in table]
    if missing:
        raise UsageError(f"{path}: no column {', '.join(missing)}; {_REMEDY}")
    check_numbers(table, path)
    words = {name: table[name].fillna("") for name in _WORDS if name in table}
    return table.assign(sparsity=table.sparsity.astype(float), **words)


def check_numbers(table: pd.DataFrame, path: Path) -> None:
    """Raise UsageError if a column of numbers has a word.

    Args:
        table: a collected table.
        path: its file. The message names file, row, column and value.
    """
    for name in table.columns:
        if name in _TEXTS or not len(table) or pd.api.types.is_numeric_dtype(table[name]):
            continue
        wrong = table[name].notna() & pd.to_numeric(table[name], errors="coerce").isna()
        for index in table.index[wrong][:1]:
            raise UsageError(
                f"{path}: row {index + 2}: {name} = {shortened(str(table[name][index]))}: expected "
                f"a number; {_REMEDY}"
            )


def groups(study: Study) -> list[Group]:
    """The groups of the grid, in its order."""
    return [Group(*place) for place in study.by_group]


def cells(study: Study, group: Group | None = None) -> list[Cell]:
    """The cells of one group, or of the whole study."""
    if group is None:
        return study.cells()
    return list(study.by_group.get((group.dataset, group.arch, group.objective), ()))


def cells_at(study: Study, group: Group, method: str, sparsity: float) -> list[Cell]:
    """Cells of a method at a sparsity, for all seeds; dense methods ignore `sparsity`."""
    place = (method, study.sparsity_of(method, sparsity))
    return [cell for cell in cells(study, group) if (cell.method, cell.sparsity) == place]


def methods(study: Study, group: Group | None = None) -> list[str]:
    """All methods: dense networks first, then those of the grid in its order, external models last.

    A network that other methods start from counts as a method.
    """
    found = dict.fromkeys(cell.method for cell in cells(study, group))
    order = dict.fromkeys([*(n for b in study.grid for n in b.methods), *study.models])
    places = {name: index for index, name in enumerate(order)}
    return sorted(found, key=lambda name: (not study.is_dense(name), places.get(name, -1)))


def sparsities(study: Study, group: Group | None = None) -> list[float]:
    """All sparsities of the sparse networks, ascending; only 0 if a group has no sparse network."""
    if group is None:
        return sorted({s for one in groups(study) for s in sparsities(study, one)})
    found = {c.sparsity for c in cells(study, group) if not study.is_dense(c.method)}
    return sorted(found or {0.0})


def seeds(study: Study, group: Group | None = None) -> list[int]:
    """All seeds, ascending."""
    return sorted({cell.seed for cell in cells(study, group)})


def lines(study: Study, group: Group) -> list[tuple[str, float]]:
    """(method, sparsity) of every line in the table of a group, also without results."""
    found = {(cell.method, cell.sparsity) for cell in cells(study, group)}
    order = methods(study, group)
    return sorted(found, key=lambda line: (order.index(line[0]), line[1]))


def attacks(study: Study) -> list[str]:
    """Attacks in the order of the config; `clean` is always measured and comes first."""
    chosen = (name for names in study.evaluation.selections.values() for name in names)
    return list(dict.fromkeys(["clean", *chosen]))


class Outcomes:
    """Which test images each network classifies correctly under each attack."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._read = functools.cache(functools.partial(_flags, layout))

    def labels(self, cell: Cell, selection: str) -> np.ndarray | None:
        """Class of each image (int N), or None if the network was not attacked here."""
        return self._read(cell, selection).get("labels")

    def correct(self, cell: Cell, selection: str, attack: str) -> np.ndarray | None:
        """Correct under all components of the attack (bool N); None without the attack."""
        return self._read(cell, selection).get(f"{attack}.all")

    def corrupted(self, cell: Cell, selection: str, name: str, severity: int) -> np.ndarray:
        """Correct on the images with a corruption that was measured (bool N).

        Raises:
            UsageError: if the file of outcomes lacks it.
        """
        found = self._read(cell, selection).get(f"corrupted.{name}.{severity}")
        if found is None:
            raise UsageError(
                f"{cell.key} {selection}: no outcome of {name} {severity}; run `robsparse collect "
                "CONFIG` again"
            )
        return found

    def distances(self, cell: Cell, selection: str, attack: str) -> np.ndarray | None:
        """Smallest perturbation that breaks each image (float N); None if it is not measured.

        It is 0 if the clean image is misclassified, and inf if no perturbation was found.
        """
        return self._read(cell, selection).get(f"{attack}.distance")

    def pictures(self, cell: Cell, selection: str, attack: str) -> dict[int, "Broken"]:
        """Some of the images that the attack broke, by image index."""
        found = _flags(self._layout, cell, selection, pictures=True)  # too large to be kept
        names = (f"{attack}.{name}" for name in ("pictured", "predicted", "pictures"))
        stored = [found.get(name, np.zeros(0)) for name in names]
        return {
            int(index): Broken(pair[0], pair[1], int(label))
            for index, label, pair in zip(*stored, strict=True)
        }


class Broken(NamedTuple):
    """A clean image (C×H×W, in [0,1]), its adversarial image, and the class predicted for it."""

    clean: np.ndarray
    perturbed: np.ndarray
    predicted: int


def _flags(
    layout: Layout, cell: Cell, selection: str, pictures: bool = False
) -> dict[str, np.ndarray]:
    path = layout.flags(cell, selection)
    if not path.exists():
        return {}
    return read_flags(path, pictures)
