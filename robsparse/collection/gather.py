"""Reads all records of a study, and refuses records that contradict each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, read_table, read_text
from robsparse.records.columns import OUTCOME_COLUMNS
from robsparse.records.evaluation_record import Record, read_flags, read_record
from robsparse.records.rows import KEY, Row, contradiction
from robsparse.records.training_record import read_training
from robsparse.schema.evaluation import Selection
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

NETWORK_KEY = KEY[:7]  # without attack and component
CELL_KEY = KEY[:6]  # without selection, attack and component


@dataclass
class Gathered:
    """The content of all records of a study; each entry is a row of a collected table.

    other_code: for each of `rows`: "training", "evaluation" or both, if other code than the
        present code did it; else "".
    failures: networks with a failed training.
    missing: names of networks without a record of evaluation.
    """

    rows: list[Row] = field(default_factory=list)
    other_code: list[str] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    histogram: list[dict[str, Any]] = field(default_factory=list)
    sanity_checks: list[dict[str, Any]] = field(default_factory=list)
    corruptions: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    steps: list[pd.DataFrame] = field(default_factory=list)
    lifetimes: list[pd.DataFrame] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def gather(study: Study, layout: Layout) -> Gathered:
    """Read every record of the study that exists.

    Raises:
        UsageError: if a record is damaged, if it was made with other settings, or if it does not
            match the weights, the outcomes of single images or the record of training.
    """
    found = Gathered()
    for cell in study.cells():
        for selection in study.evaluation.selections:
            if layout.evaluation(cell, selection).exists():
                _gather_evaluation(found, study, cell, selection, layout)
            else:
                found.missing.append(f"{cell.key} {selection}")
        if layout.training(cell).exists():
            _gather_training(found, cell, layout)
        if layout.failed(cell).exists():
            reason = " ".join(read_text(layout.failed(cell), "delete this file").split())
            found.failures.append(_cell_key(cell) | {"reason": reason})
    return found


def _cell_key(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in CELL_KEY}


def _gather_evaluation(
    found: Gathered, study: Study, cell: Cell, selection: Selection, layout: Layout
) -> None:
    path = layout.evaluation(cell, selection)
    record = read_record(path)
    present = fingerprints.evaluation(study, cell, selection)
    if record.rows[0].settings_digest != present.digest:
        raise UsageError(f"{path}: made with other settings; run snakemake first")
    _check_weights(cell, selection, record, layout)
    outcomes = _read_outcomes(path, layout.flags(cell, selection), record)
    key = _cell_key(cell) | {"selection": selection}
    found.rows += record.rows
    found.outcomes += [key | row for row in _packed(record, outcomes)]
    found.other_code += [_other_code(study, cell, record, present, layout)] * len(record.rows)
    found.layers += [key | layer for layer in record.layers]
    found.histogram += [key | bin_ for bin_ in record.histogram]
    found.sanity_checks.append(key | _sanity_checks(record))
    found.corruptions += [key | row for row in record.corruptions]


def _check_weights(cell: Cell, selection: Selection, record: Record, layout: Layout) -> None:
    """Raise UsageError unless the attacked weights are those on disk and those of training."""
    path, training = layout.model(cell, selection), layout.training(cell)
    [attacked, *other] = {row.model_checksum for row in record.rows}
    if other or (path.exists() and file_checksum(path) != attacked):
        raise UsageError(
            f"{path}: these are not the weights that were attacked, or the file is damaged; "
            "delete the file and run snakemake again"
        )
    if not training.exists():
        return
    trained = read_training(training)
    if trained.get("weights", {}).get(selection) != attacked:
        raise UsageError(
            f"{training}: the weights that training saved ({selection}) are not the weights that "
            "were attacked; run snakemake again"
        )
    if trained.get("data_checksum") != record.rows[0].data_checksum:
        raise UsageError(f"{training}: training and attack used different data sets")


def _packed(record: Record, outcomes: dict[str, Any]) -> list[dict[str, Any]]:
    """A row with OUTCOME_COLUMNS for each attack."""
    found = []
    for row in record.rows:
        if row.component == "all":
            bits = np.packbits(outcomes[f"{row.attack}.all"].astype(bool)).tobytes()
            values = (row.attack, row.n_examples, bits)
            found.append(dict(zip(OUTCOME_COLUMNS, values, strict=True)))
    return found


def _read_outcomes(path: Path, flags: Path, record: Record) -> dict[str, Any]:
    """Read the outcomes of the single images.

    Raises:
        UsageError: unless the rows agree with them.
    """
    if not flags.exists() or file_checksum(flags) != record.outcomes:
        raise UsageError(
            f"{flags}: missing, or not the outcomes that belong to the record; "
            f"delete {path.name} in the same folder and run snakemake again"
        )
    outcomes = read_flags(flags)
    for row in record.rows:
        if wrong := contradiction(row, outcomes):
            raise UsageError(f"{path}: {row.attack} {row.component}: {wrong}")
    for corrupted in record.corruptions:
        name = f"{corrupted['corruption']}.{corrupted['severity']}"
        seen = outcomes.get(f"corrupted.{name}", ())
        counts = (int(sum(seen)), len(seen))
        if counts != (corrupted["n_correct"], corrupted["n_examples"]):
            raise UsageError(
                f"{path}: corruption {name}: {corrupted['n_correct']} of "
                f"{corrupted['n_examples']} images correct, but the outcomes of the images have "
                f"{counts[0]} of {counts[1]}"
            )
    return outcomes


def _other_code(
    study: Study, cell: Cell, record: Record, present: fingerprints.Fingerprint, layout: Layout
) -> str:
    """The entry of `Gathered.other_code` for one network."""
    same = {"evaluation": record.rows[0].code_digest == present.code}
    if layout.training(cell).exists():
        trained = read_training(layout.training(cell)).get("code_digest")
        same["training"] = trained == fingerprints.training(study, cell).code
    return " and ".join(sorted(name for name in same if not same[name]))


def _sanity_checks(record: Record) -> dict[str, Any]:
    """The sanity checks of one network, with two columns about its attacks.

    `largest_perturbation` is divided by the eps of its attack.
    """
    reached = [r.max_perturbation / r.eps for r in record.rows if r.max_perturbation and r.eps]
    return record.sanity_checks | {
        "largest_perturbation": max(reached, default=None),
        "nan_count": sum(row.nan_count for row in record.rows),
    }


def _gather_training(found: Gathered, cell: Cell, layout: Layout) -> None:
    key = _cell_key(cell)
    record = read_training(layout.training(cell))
    found.curves += [key | point for point in record["curve"]]
    steps, lifetimes = (
        _connections(path, record) for path in (layout.steps(cell), layout.lifetimes(cell))
    )
    if len(steps):
        found.steps.append(steps.astype({"layer": str}).assign(**key))
        found.lifetimes.append(lifetimes.assign(**key))


def _connections(path: Path, record: dict[str, Any]) -> pd.DataFrame:
    """Read a table of the history of connections. Raises UsageError unless training wrote it."""
    remedy, saved = "delete it and train this network again", record.get("tables", {})
    if path.name in saved and file_checksum(path) != saved[path.name]:
        raise UsageError(f"{path}: damaged or changed, not as training saved it; {remedy}")
    return read_table(path, remedy)
