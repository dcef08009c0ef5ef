"""Compares two runs of a study: which rows of the table agree within their paired intervals.

A row is a method at a sparsity, with all its seeds. For each attack, the outcome of each image and
seed in one run is compared with the outcome of the same image and seed in the other run; the model
is that of `statistics`. Two runs of one seed differ because another processor adds numbers in
another order. A study has few seeds, so this variance is estimated from all rows together: a row
has the mean over the rows, or its own variance if that is larger. All intervals of a comparison
hold together with a probability of 95 % (Bonferroni), so a script can rely on its exit code.

Import path: robsparse.figures.data.agreement
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from robsparse.base.errors import UsageError, nearest_match, one_line
from robsparse.base.files import read_table
from robsparse.figures.data import statistics
from robsparse.figures.data.statistics import Difference
from robsparse.figures.data.tidy import LINE, check_numbers
from robsparse.records.columns import OUTCOME_COLUMNS
from robsparse.records.rows import KEY

# Two rows are only compared if these columns are equal.
_SETTINGS = ("data_checksum", "n_examples", "norm", "eps", "steps", "restarts", "version")

Line = tuple[str | float, ...]  # the values of the columns LINE


@dataclass(frozen=True)
class Run:
    """The results of one run.

    results: rows of whole attacks, of one selection.
    outcomes: correct images (bool N) by the values of KEY without selection and component; empty if
        they were not saved.
    """

    folder: Path
    results: pd.DataFrame
    outcomes: Mapping[tuple[object, ...], np.ndarray]

    def lines(self) -> list[Line]:
        """All rows of the table, in the order of the results."""
        return [*dict.fromkeys(self.results[LINE].itertuples(index=False, name=None))]

    def of(self, line: Line, attack: str) -> pd.DataFrame:
        """The results of a line under an attack, one for each seed, in the order of seeds."""
        wanted = (self.results[LINE] == list(line)).all(axis=1) & (self.results.attack == attack)
        return self.results[wanted].sort_values("seed")


@dataclass(frozen=True)
class Compared:
    """A row of the table under one attack: accuracies in both runs, and the difference A - B."""

    line: Line
    attack: str
    a: float
    b: float
    difference: Difference
    equal: bool

    def within(self, level: float) -> bool:
        """Whether the interval of the difference contains 0."""
        low, high = self.difference.interval(level)
        return low <= 0 <= high


@dataclass(frozen=True)
class Agreement:
    """The comparison of two runs.

    compared: each row of the table under each attack.
    reasons: rows that cannot be compared, with the reason.
    """

    a: Run
    b: Run
    selection: str
    compared: list[Compared]
    reasons: dict[Line, str]

    @property
    def level(self) -> float:
        """The level of one interval. All together have the level of the other intervals."""
        return 1 - (1 - statistics.LEVEL) / max(len(self.compared), 1)

    @property
    def apart(self) -> set[Line]:
        """The rows with an attack whose interval does not contain 0."""
        return {one.line for one in self.compared if not one.within(self.level)}

    @property
    def holds(self) -> bool:
        """Whether every row of both runs agrees."""
        return bool(self.compared) and not self.apart and not self.reasons

    def __str__(self) -> str:
        return self.text()

    def text(self, every: bool = False) -> str:
        """Return the comparison as text.

        Args:
            every: one line for each attack; else, of each row only the attack that is most apart.
        """
        shown = self.compared if every else [*self._most_apart()]
        table = tabulate(
            [self._cells(one) for one in shown],
            headers=("row", "attack", "A %", "B %", "A - B", "interval", ""),
            tablefmt="simple",
            disable_numparse=True,
            colalign=("left", "left", "right", "right", "right", "right", "left"),
        )
        lines = [f"{_name(line)}: not compared: {text}" for line, text in self.reasons.items()]
        return "\n".join([*self._head(), "", table, *lines, "", self._verdict()])

    def _head(self) -> Iterator[str]:
        for letter, run in (("A", self.a), ("B", self.b)):
            versions = ", ".join(sorted(map(str, run.results.code_version.unique())))
            yield f"{letter}: {run.folder} (code {versions})"
        attacks = ", ".join(dict.fromkeys(one.attack for one in self.compared))
        seeds = sorted({one.difference.seeds for one in self.compared})
        yield (
            f"selection {self.selection}; {attacks}; {len(self.compared)} intervals that hold "
            f"together at {statistics.LEVEL:.0%}"
        )
        if not (self.a.outcomes and self.b.outcomes):
            run = self.b if self.a.outcomes else self.a
            yield (
                f"{run.folder}: no outcomes.parquet, so intervals are not paired by image and are "
                "wider than necessary; `robsparse collect CONFIG` writes it"
            )
        if seeds[:1] == [1]:
            yield "rows with one seed: the interval is over images only"

    def _most_apart(self) -> Iterator[Compared]:
        """Yield for each row the attack that is most apart, in units of its interval."""
        for line in dict.fromkeys(one.line for one in self.compared):
            own = [one for one in self.compared if one.line == line]
            yield max(own, key=lambda one: abs(one.difference.mean) / self._half(one))

    def _half(self, one: Compared) -> float:
        low, high = one.difference.interval(self.level)
        return max((high - low) / 2, 1e-9)

    def _cells(self, one: Compared) -> list[str]:
        low, high = one.difference.interval(self.level)
        verdict = "agrees" if one.within(self.level) else "DIFFERS"
        numbers = [f"{100 * one.a:.2f}", f"{100 * one.b:.2f}", f"{100 * one.difference.mean:+.2f}"]
        interval = f"[{100 * low:+.1f}, {100 * high:+.1f}]"
        return [_name(one.line), one.attack, *numbers, interval, "equal" if one.equal else verdict]

    def _verdict(self) -> str:
        rows = {one.line for one in self.compared} | set(self.reasons)
        good = len(rows) - len(self.apart | set(self.reasons))
        word = "reproduced" if self.holds else "not reproduced"
        widest = max((self._half(one) for one in self.compared), default=0.0)
        equal = sum(one.equal for one in self.compared)
        return (
            f"{equal} of {len(self.compared)} comparisons have the same outcome for every image; "
            f"the widest interval is +-{100 * widest:.1f} points\n"
            f"{word}: {good} of {len(rows)} rows within intervals"
        )


def agreement(folder_a: Path, folder_b: Path, selection: str | None = None) -> Agreement:
    """Compare two runs.

    Args:
        folder_a, folder_b: folders with results.csv, and outcomes.parquet if it was saved.
        selection: the weights that are compared; None: the first selection of `folder_a`.

    Raises:
        UsageError: if a file is missing or damaged, or if a run has no row of the selection.
    """
    first, second = _read_results(folder_a), _read_results(folder_b)
    chosen = selection or str(first.selection.iloc[0])
    a, b = _run_of(folder_a, first, chosen), _run_of(folder_b, second, chosen)
    attacks = [name for name in a.results.attack.unique() if name in set(b.results.attack)]
    compared: list[Compared] = []
    reasons: dict[Line, str] = {}
    for line in dict.fromkeys([*a.lines(), *b.lines()]):
        absent = [f"not in {run.folder}" for run in (a, b) if line not in run.lines()]
        found = [] if absent else [_compare(a, b, line, attack) for attack in attacks]
        wrong = absent + [one for one in found if isinstance(one, str)]
        if wrong or not found:
            reasons[line] = wrong[0] if wrong else "no attack in common"
        else:
            compared += [one for one in found if isinstance(one, Compared)]
    return Agreement(a, b, chosen, _pooled(compared), reasons)


def _read_results(folder: Path) -> pd.DataFrame:
    """Rows of whole attacks. Results of an earlier version have fewer columns than those of today.

    Raises:
        UsageError: if the file is missing or damaged, has no row, or lacks a column.
    """
    path, needed = folder / "results.csv", [*KEY, "accuracy", "n_correct", "code_version"]
    if not path.exists():
        raise UsageError(f"{path}: no such file; expected the folder of a run, like results/quick")
    table = read_table(path)
    if missing := [name for name in (*needed, *_SETTINGS) if name not in table]:
        raise UsageError(f"{path}: no column {', '.join(missing)}; run `robsparse collect CONFIG`")
    check_numbers(table, path)
    table = table[table.component == "all"]
    if table.empty:
        raise UsageError(f"{path}: expected at least one row")
    return table


def _run_of(folder: Path, results: pd.DataFrame, selection: str) -> Run:
    known, own = results.selection.unique(), results[results.selection == selection]
    if own.empty:
        raise UsageError(
            f"{folder / 'results.csv'}: no row of the selection '{selection}', expected one of: "
            f"{', '.join(known)}{nearest_match(selection, known)}"
        )
    return Run(folder, own, _read_outcomes(folder / "outcomes.parquet", selection))


def _read_outcomes(path: Path, selection: str) -> dict[tuple[object, ...], np.ndarray]:
    """Correct images by the values of KEY without selection and component; {} without a file."""
    if not path.exists():
        return {}
    names = [*KEY[:6], "attack"]
    remedy = "run `robsparse collect CONFIG` again"
    table = read_table(path, remedy, columns=[*KEY[:7], *OUTCOME_COLUMNS])
    table = table[table.selection == selection]
    try:
        return {
            tuple(getattr(row, name) for name in names): np.unpackbits(
                np.frombuffer(row.correct, np.uint8), count=row.n_examples
            ).astype(bool)
            for row in table.itertuples()
        }
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: damaged ({one_line(error)}); {remedy}") from None


def _compare(a: Run, b: Run, line: Line, attack: str) -> Compared | str:
    """Compare a row under an attack; a text says why that is not possible."""
    ours, theirs = a.of(line, attack), b.of(line, attack)
    for run, rows in ((a, ours), (b, theirs)):
        if rows.empty:
            return f"no result of {attack} in {run.folder}"
    if ours.seed.tolist() != theirs.seed.tolist():
        return f"other seeds: {ours.seed.tolist()} and {theirs.seed.tolist()}"
    for name in _SETTINGS:
        values = ours[name].astype(str).tolist(), theirs[name].astype(str).tolist()
        if values[0] != values[1]:
            return f"{attack}: other {name}: {values[0][0]} and {values[1][0]}"
    stacked_a, stacked_b = _stack(a, ours), _stack(b, theirs)
    accuracies = float(ours.accuracy.mean()), float(theirs.accuracy.mean())
    if stacked_a is None or stacked_b is None:
        return Compared(line, attack, *accuracies, _unpaired(ours, theirs), equal=False)
    found = statistics.difference(stacked_a, stacked_b)
    return Compared(line, attack, *accuracies, found, bool((stacked_a == stacked_b).all()))


def _stack(run: Run, rows: pd.DataFrame) -> np.ndarray | None:
    """The outcomes of the images of all seeds (bool S×N); None if they were not saved.

    Raises:
        UsageError: if they contradict the results.
    """
    found = []
    for _, row in rows.iterrows():
        seen = run.outcomes.get(tuple(row[[*KEY[:6], "attack"]]))
        if seen is None:
            return None
        if int(seen.sum()) != row.n_correct:
            raise UsageError(
                f"{run.folder / 'outcomes.parquet'}: {int(seen.sum())} correct images of "
                f"{_name(tuple(row[LINE]))} seed {row.seed} under {row.attack}, expected "
                f"{row.n_correct} as in results.csv"
            )
        found.append(seen)
    return np.stack(found)


def _unpaired(ours: pd.DataFrame, theirs: pd.DataFrame) -> Difference:
    """The difference without outcomes of images, paired by seed only.

    The variance of images is that of two independent samples of images, which all seeds share. It
    is too large, because both runs have the same images.
    """
    apart = ours.accuracy.to_numpy() - theirs.accuracy.to_numpy()
    images, seeds = int(ours.n_examples.iloc[0]), len(apart)
    means = ours.accuracy.mean(), theirs.accuracy.mean()
    of_images = sum(mean * (1 - mean) for mean in means) / images
    of_seeds = float(apart.var(ddof=1)) / seeds if seeds > 1 else float("nan")
    return Difference(float(apart.mean()), seeds, images, of_seeds, max(of_images, 1 / images**2))


def _pooled(compared: list[Compared]) -> list[Compared]:
    """Give each row the variance between seeds that all rows have under its attack, if larger."""
    found = []
    for one in compared:
        alike = [other.difference for other in compared if other.attack == one.attack]
        alike = [other for other in alike if other.seeds > 1]
        own = one.difference
        if own.seeds > 1:
            freedom = sum(other.seeds - 1 for other in alike)
            squares = sum(other.of_seeds * other.seeds * (other.seeds - 1) for other in alike)
            of_seeds = max(own.of_seeds, squares / freedom / own.seeds)
            own = replace(own, of_seeds=of_seeds, freedom=freedom)
        found.append(replace(one, difference=own))
    return found


def _name(line: Line) -> str:
    dataset, arch, objective, method, sparsity = line
    return f"{dataset}/{arch}/{objective} {method} {float(sparsity):.4g}"
