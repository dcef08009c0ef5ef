"""Reads all records of a study, and refuses records that contradict each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from robsparse.base.errors import UsageError
from robsparse.base.files import count_rows, file_checksum, read_table, read_text
from robsparse.collection.tables import Rows, Streamed
from robsparse.records.columns import OUTCOME_COLUMNS
from robsparse.records.evaluation_record import Record, read_flags, read_record
from robsparse.records.rows import KEY, contradiction
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

    results: result rows, with the column `other_code`: "training", "evaluation" or both, if other
        code than the present code did it; else "".
    steps, lifetimes: the tables of methods that rewire.
    failures: networks with a failed training.
    missing: names of networks without a record of evaluation.
    outcome_files: checksums of the files of outcomes, which belong to the records.
    """

    steps: Streamed
    lifetimes: Streamed
    results: Rows = field(default_factory=Rows)
    outcomes: Rows = field(default_factory=Rows)
    layers: Rows = field(default_factory=Rows)
    histogram: Rows = field(default_factory=Rows)
    sanity_checks: Rows = field(default_factory=Rows)
    corruptions: Rows = field(default_factory=Rows)
    curves: Rows = field(default_factory=Rows)
    failures: Rows = field(default_factory=Rows)
    missing: list[str] = field(default_factory=list)
    outcome_files: dict[Path, str] = field(default_factory=dict)


def gather(study: Study, layout: Layout, steps: Streamed, lifetimes: Streamed) -> Gathered:
    """Read every record of the study that exists, each file once.

    Args:
        study: the resolved study.
        layout: paths of the records.
        steps, lifetimes: files that get the tables of methods that rewire.

    Raises:
        UsageError: if a record is damaged, if it was made with other settings, or if it does not
            match the weights, the outcomes of single images or the record of training.
    """
    found = Gathered(steps, lifetimes)
    for cell in study.cells():
        path = layout.training(cell)
        training = read_training(path) if path.exists() else None
        for selection in study.evaluation.selections:
            if layout.evaluation(cell, selection).exists():
                _gather_evaluation(found, study, cell, selection, layout, training=training)
            else:
                found.missing.append(f"{cell.key} {selection}")
        if training is not None:
            _gather_training(found, cell, layout, training)
        if layout.failed(cell).exists():
            reason = " ".join(read_text(layout.failed(cell), "delete this file").split())
            found.failures.add([_cell_key(cell) | {"reason": reason}])
    return found


def _cell_key(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in CELL_KEY}


def _gather_evaluation(
    found: Gathered,
    study: Study,
    cell: Cell,
    selection: Selection,
    layout: Layout,
    *,
    training: dict[str, Any] | None,
) -> None:
    path = layout.evaluation(cell, selection)
    record = read_record(path)
    present = fingerprints.evaluation(study, cell, selection)
    if record.rows[0].settings_digest != present.digest:
        raise UsageError(f"{path}: made with other settings; run snakemake first")
    _check_weights(cell, selection, record, layout, training=training)
    flags = layout.flags(cell, selection)
    outcomes = _read_outcomes(path, flags, record)
    found.outcome_files[flags] = record.outcomes
    key = _cell_key(cell) | {"selection": selection}
    other = {"other_code": _other_code(study, cell, record, present, training)}
    found.results.add(row.model_dump() | other for row in record.rows)
    found.outcomes.add(key | row for row in _packed(record, outcomes))
    found.layers.add(key | layer for layer in record.layers)
    found.histogram.add(key | bin_ for bin_ in record.histogram)
    found.sanity_checks.add([key | _sanity_checks(record)])
    found.corruptions.add(key | row for row in record.corruptions)


def _check_weights(
    cell: Cell,
    selection: Selection,
    record: Record,
    layout: Layout,
    *,
    training: dict[str, Any] | None,
) -> None:
    """Raise UsageError unless the attacked weights are those on disk and those of training."""
    path = layout.model(cell, selection)
    [attacked, *other] = {row.model_checksum for row in record.rows}
    if other or (path.exists() and file_checksum(path) != attacked):
        raise UsageError(
            f"{path}: these are not the weights that were attacked, or the file is damaged; "
            "delete the file and run snakemake again"
        )
    if training is None:
        return
    if training.get("weights", {}).get(selection) != attacked:
        raise UsageError(
            f"{layout.training(cell)}: the weights that training saved ({selection}) are not the "
            "weights that were attacked; run snakemake again"
        )
    if training.get("data_checksum") != record.rows[0].data_checksum:
        raise UsageError(f"{layout.training(cell)}: training and attack used different data sets")


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
    outcomes = read_flags(flags, pictures=False)
    for row in record.rows:
        if wrong := contradiction(row, outcomes):
            raise UsageError(f"{path}: {row.attack} {row.component}: {wrong}")
    for corrupted in record.corruptions:
        name = f"{corrupted['corruption']}.{corrupted['severity']}"
        seen = outcomes.get(f"corrupted.{name}", np.zeros(0))
        counts = (int(np.sum(seen)), len(seen))
        if counts != (corrupted["n_correct"], corrupted["n_examples"]):
            raise UsageError(
                f"{path}: corruption {name}: {corrupted['n_correct']} of "
                f"{corrupted['n_examples']} images correct, but the outcomes of the images have "
                f"{counts[0]} of {counts[1]}"
            )
    return outcomes


def _other_code(
    study: Study,
    cell: Cell,
    record: Record,
    present: fingerprints.Fingerprint,
    training: dict[str, Any] | None,
) -> str:
    """The column `other_code` of one network."""
    same = {"evaluation": record.rows[0].code_digest == present.code}
    if training is not None:
        trained = training.get("code_digest")
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


def _gather_training(found: Gathered, cell: Cell, layout: Layout, training: dict[str, Any]) -> None:
    key = _cell_key(cell)
    found.curves.add(key | point for point in training["curve"])
    steps, lifetimes = (
        _connections(path, training) for path in (layout.steps(cell), layout.lifetimes(cell))
    )
    if steps is not None:
        found.steps.add(steps.astype({"layer": str}).assign(**key))
    if lifetimes is not None:
        found.lifetimes.add(lifetimes.assign(**key))


def _connections(path: Path, record: dict[str, Any]) -> pd.DataFrame | None:
    """Read a table of the history of connections; None if it is empty.

    Raises:
        UsageError: if the table is damaged, or is not the one that training wrote.
    """
    remedy, saved = "delete it and train this network again", record.get("tables", {})
    if path.name in saved and file_checksum(path) != saved[path.name]:
        raise UsageError(f"{path}: damaged or changed, not as training saved it; {remedy}")
    return read_table(path, remedy) if count_rows(path, remedy) else None
