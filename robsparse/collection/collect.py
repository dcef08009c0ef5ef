"""Gathers the records of a study into tidy tables and refuses to publish what cannot be true."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from robsparse.base.counts import keep_count
from robsparse.base.errors import UsageError
from robsparse.base.files import atomic, file_checksum, read_json, write_json
from robsparse.collection import overlap
from robsparse.records.columns import (
    COLLECTED,
    LIFETIME_COLUMNS,
    MANIFEST,
    OVERLAP_COLUMNS,
    STEP_COLUMNS,
)
from robsparse.records.evaluation_record import Record, read_flags, read_record
from robsparse.records.rows import KEY, Row, contradiction
from robsparse.schema import Selection
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

_MODEL_KEY = KEY[:7]  # all but attack and component
_TOLERANCE = 1e-6


@dataclass
class Gathered:
    """Tidy tables of all finished jobs, what is known of those that failed, and what is missing."""

    rows: list[Row] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    histogram: list[dict[str, Any]] = field(default_factory=list)
    sanity_checks: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    steps: list[pd.DataFrame] = field(default_factory=list)
    lifetimes: list[pd.DataFrame] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    other_code: list[str] = field(default_factory=list)


def collect(study: Study, layout: Layout, folder: Path) -> str:
    """Write results.csv and .parquet and the tables of layers, curves and connections; say where.

    Records are read from the layout's folder, tables are written to `folder`.

    Raises UsageError, one line a fault, when a record is damaged, was made with other settings or
    fails a check; nothing is written then.
    """
    gathered = gather(study, layout)
    if not gathered.rows:
        raise UsageError(
            f"{layout.root}: no finished evaluation of the study '{study.study}' found"
        )
    measured = pd.DataFrame([row.model_dump() for row in gathered.rows])
    measured["other_code"] = gathered.other_code
    results = mark_missed_budgets(mark_weak_attacks(measured))
    faults = find_faults(results)
    if faults:
        raise UsageError("\n".join(f"{layout.root}: {fault}" for fault in faults))
    _write(folder / "results.csv", results)
    _write(folder / "results.parquet", results)
    _write(folder / "layers.csv", pd.DataFrame(gathered.layers))
    _write(folder / "curves.csv", pd.DataFrame(gathered.curves))
    _write(folder / "weights.csv", pd.DataFrame(gathered.histogram))
    _write(folder / "sanity_checks.csv", pd.DataFrame(gathered.sanity_checks))
    failures = pd.DataFrame(gathered.failures, columns=[*_MODEL_KEY[:-1], "reason"])
    _write(folder / "failures.csv", failures)
    _write(folder / "steps.parquet", _joined(gathered.steps, STEP_COLUMNS))
    _write(folder / "lifetimes.parquet", _joined(gathered.lifetimes, LIFETIME_COLUMNS))
    pairs = overlap.overlaps(study, layout)
    _write(folder / "overlap.csv", pd.DataFrame(pairs, columns=list(OVERLAP_COLUMNS)))
    write_json(folder / MANIFEST, _manifest(study, layout, folder))
    text = f"collected {len(results)} rows: {folder / 'results.csv'}"
    others = sum(map(bool, gathered.other_code))
    if others:
        text += f"\n{others} rows were made by other code than the present: column other_code"
    for failure in gathered.failures:
        text += f"\nfailed: {failure['reason']}"
    for name in gathered.missing:
        text += f"\nmissing, printed as n/a: {name}"
    return text


def _manifest(study: Study, layout: Layout, folder: Path) -> dict[str, Any]:
    """What the tables were made from, and a checksum of each file; `figures` compares them."""
    flags = (
        layout.flags(cell, selection)
        for cell in study.cells()
        for selection in study.evaluation.selections
    )
    return {
        "fingerprint": fingerprints.collected(study).plan,
        "tables": {name: file_checksum(folder / name) for name in COLLECTED if name != MANIFEST},
        "outcomes": {
            path.relative_to(layout.root).as_posix(): file_checksum(path)
            for path in flags
            if path.exists()
        },
    }


def gather(study: Study, layout: Layout) -> Gathered:
    """Read every record of the study that exists. Raises UsageError for damaged or stale ones."""
    found = Gathered()
    for cell in study.cells():
        axes = {name: getattr(cell, name) for name in _MODEL_KEY if hasattr(cell, name)}
        for selection in study.evaluation.selections:
            path = layout.evaluation(cell, selection)
            if not path.exists():
                found.missing.append(f"{cell.key} {selection}")
                continue
            record = read_record(path)
            now = fingerprints.evaluation(study, cell, selection)
            if record.rows[0].settings_digest != now.digest:
                raise UsageError(f"{path}: made with other settings; run snakemake first")
            _check_weights(cell, selection, record, layout)
            _check_outcomes(path, layout.flags(cell, selection), record)
            found.rows += record.rows
            found.other_code += [_other_code(study, cell, record, now, layout)] * len(record.rows)
            found.layers += [axes | {"selection": selection} | layer for layer in record.layers]
            found.histogram += [axes | {"selection": selection} | b for b in record.histogram]
            found.sanity_checks.append(axes | {"selection": selection} | _sanity_checks_of(record))
        _gather_training(found, cell, axes, layout)
        if layout.failed(cell).exists():
            reason = " ".join(layout.failed(cell).read_text(encoding="utf-8").split())
            found.failures.append(axes | {"reason": reason})
    return found


def _check_weights(cell: Cell, selection: Selection, record: Record, layout: Layout) -> None:
    """Raise UsageError unless the weights that were saved, are there and were attacked are one."""
    path, training = layout.model(cell, selection), layout.training(cell)
    [attacked, *other] = {row.model_checksum for row in record.rows}
    if other or (path.exists() and file_checksum(path) != attacked):
        raise UsageError(
            f"{path}: not the weights that were attacked, but others or damaged ones; "
            "delete the file and run snakemake again"
        )
    if not training.exists():
        return
    trained = read_json(training)
    if trained.get("weights", {}).get(selection) != attacked:
        raise UsageError(
            f"{training}: training saved other weights ({selection}) than were attacked; "
            "run snakemake again"
        )
    if trained.get("data_checksum") != record.rows[0].data_checksum:
        raise UsageError(f"{training}: trained on another data set than was attacked")


def _check_outcomes(path: Path, flags: Path, record: Record) -> None:
    """Raise UsageError unless the rows are what the outcomes of the single images say."""
    if not flags.exists() or file_checksum(flags) != record.outcomes:
        raise UsageError(
            f"{flags}: not the outcomes that the record was made from, or gone; "
            f"delete {path.name} beside it and run snakemake again"
        )
    outcomes = read_flags(flags)
    for row in record.rows:
        if fault := contradiction(row, outcomes):
            raise UsageError(f"{path}: {row.attack} {row.component}: {fault}")


def _other_code(
    study: Study,
    cell: Cell,
    record: Record,
    now: fingerprints.Fingerprint,
    layout: Layout,
) -> str:
    """Which of training and evaluation were done by other code than the present, in words."""
    done = {"evaluation": record.rows[0].code_digest == now.code}
    if layout.training(cell).exists():
        trained = read_json(layout.training(cell)).get("code_digest")
        done["training"] = trained == fingerprints.training(study, cell).code
    return " and ".join(sorted(name for name, same in done.items() if not same))


def _sanity_checks_of(record: Record) -> dict[str, Any]:
    """The sanity checks of one network, and what its attacks did.

    `largest_perturbation` is a multiple of the eps of the attack that made it.
    """
    reached = [r.max_perturbation / r.eps for r in record.rows if r.max_perturbation and r.eps]
    return record.sanity_checks | {
        "largest_perturbation": max(reached, default=None),
        "nan_count": sum(row.nan_count for row in record.rows),
    }


def _gather_training(found: Gathered, cell: Cell, axes: dict[str, Any], layout: Layout) -> None:
    if not layout.training(cell).exists():
        return
    curve = read_json(layout.training(cell))["curve"]
    found.curves += [axes | point for point in curve]
    steps, lifetimes = (pd.read_parquet(f(cell)) for f in (layout.steps, layout.lifetimes))
    if len(steps):
        found.steps.append(steps.astype({"layer": str}).assign(**axes))
        found.lifetimes.append(lifetimes.assign(**axes))


def _joined(tables: list[pd.DataFrame], columns: tuple[str, ...]) -> pd.DataFrame:
    """All tables in one, with these columns at least; empty when no method rewires."""
    return pd.concat(tables or [pd.DataFrame(columns=[*_MODEL_KEY[:-1], *columns])])


def mark_weak_attacks(results: pd.DataFrame) -> pd.DataFrame:
    """Flag AutoAttack where another attack breaks more images, in `potentially_unreliable`.

    AutoAttack should be the strongest under its threat; where it is not, its number is too high,
    and all rows of that network say so.
    """
    whole = results[results.component == "all"]
    said: dict[tuple, str] = {}
    for key, rows in whole.groupby([*_MODEL_KEY, "norm", "eps"], dropna=False):
        ours = rows[rows.attack == "autoattack"].n_correct
        excess = int(ours.iloc[0] - rows.n_correct.min()) if len(ours) else 0
        if excess > 0:
            strongest = rows.loc[rows.n_correct.idxmin(), "attack"]
            version = rows.loc[rows.attack == "autoattack", "version"].iloc[0]
            name = "AutoAttack" if version == "standard" else f"AutoAttack ({version})"
            said[key[:-2]] = f"{strongest} breaks {excess} more images than {name}"
    keys = zip(*(results[name] for name in _MODEL_KEY), strict=True)
    added = pd.Series([said.get(key, "") for key in keys], index=results.index, dtype=object)
    before = results.potentially_unreliable
    joined = (before.fillna("") + "; " + added).where(added != "", before).str.strip("; ")
    return results.assign(potentially_unreliable=joined)


def mark_missed_budgets(results: pd.DataFrame) -> pd.DataFrame:
    """Add the column `budget`: filled where a network has another number of weights than asked.

    Uniform layers may miss the budget by one weight each; a larger difference is marked.
    """
    asked = [keep_count(n, s) for n, s in zip(results.prunable, results.sparsity, strict=True)]
    missed = (results.nonzero - asked).abs() > results.layers
    said = [
        f"{n:,} nonzero weights, {a:,} asked" for n, a in zip(results.nonzero, asked, strict=True)
    ]
    return results.assign(budget=pd.Series(said, index=results.index).where(missed, ""))


def find_faults(results: pd.DataFrame) -> list[str]:
    """Everything in the collected rows that cannot be true, one line each."""
    faults = []
    for _, row in results[results.duplicated(KEY)].iterrows():
        faults.append(f"{_name(row)}: this key stands twice")
    clean = results[results.attack == "clean"].set_index(_MODEL_KEY).n_correct.to_dict()
    for _, row in results.iterrows():
        faults += [f"{_name(row)}: {fault}" for fault in _row_faults(row, clean)]
    for column in ("data_checksum", "n_examples"):
        for dataset, values in results.groupby("dataset")[column].unique().items():
            if len(values) > 1:
                faults.append(
                    f"{dataset}: {column} differs between rows: {sorted(map(str, values))}"
                )
    return faults


def _row_faults(row: pd.Series, clean: dict[tuple, int]) -> list[str]:
    faults = []
    if abs(row.accuracy - row.n_correct / row.n_examples) > _TOLERANCE:
        faults.append(f"accuracy {row.accuracy} is not {row.n_correct}/{row.n_examples}")
    if not row.ci_low - _TOLERANCE <= row.accuracy <= row.ci_high + _TOLERANCE:
        faults.append(f"accuracy {row.accuracy} is outside its interval")
    best = clean.get(tuple(row[_MODEL_KEY]))
    if best is None:
        faults.append("no clean accuracy of this model")
    elif row.n_correct > best:
        faults.append(f"{row.n_correct} correct under attack, but {best} without")
    if pd.notna(row.max_perturbation) and row.max_perturbation > row.eps + _TOLERANCE:
        faults.append(f"perturbation {row.max_perturbation} is larger than eps {row.eps}")
    if row.nan_count:
        faults.append(f"{row.nan_count} NaN values in adversarial images")
    return faults


def _name(row: pd.Series) -> str:
    return "/".join(str(row[name]) for name in KEY)


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic(path) as temporary:
        if path.suffix == ".parquet":
            table.to_parquet(temporary, index=False)
        else:
            table.to_csv(temporary, index=False)
