"""Writes the collected tables of a study, and a manifest with their checksums."""

from pathlib import Path
from typing import Any

import pandas as pd

from robsparse.base.errors import UsageError
from robsparse.base.files import atomic, file_checksum, write_record, write_table
from robsparse.collection.gather import CELL_KEY, NETWORK_KEY, Gathered, gather
from robsparse.collection.overlap import mask_overlaps
from robsparse.collection.plausibility import (
    find_contradictions,
    mark_missed_budgets,
    mark_weak_attacks,
)
from robsparse.collection.tables import Streamed
from robsparse.records.columns import (
    COLLECTED,
    CORRUPTION_COLUMNS,
    LIFETIME_COLUMNS,
    LIFETIMES,
    MANIFEST,
    OUTCOME_COLUMNS,
    OVERLAP_COLUMNS,
    STEP_COLUMNS,
    STEPS,
)
from robsparse.study import fingerprints
from robsparse.study.cells import Layout
from robsparse.study.study import Study


def collect(study: Study, layout: Layout, folder: Path) -> str:
    """Write the collected tables and their manifest; return the lines to print.

    Args:
        study: the resolved study.
        layout: paths of the records.
        folder: folder that the tables are written to.

    Raises:
        UsageError: if a record is damaged, was made with other settings or fails a check; one line
            for each contradiction. Nothing is written then.
    """
    with atomic(folder / STEPS) as steps, atomic(folder / LIFETIMES) as lifetimes:
        # These two files are large, so they are written while records are read. They get their
        # names only if all records are as they should be. Errors of reading name their own file.
        streams = (
            Streamed(steps, [*CELL_KEY, *STEP_COLUMNS]),
            Streamed(lifetimes, [*CELL_KEY, *LIFETIME_COLUMNS]),
        )
        gathered = gather(study, layout, *streams)
        results = _checked(study, layout, gathered)
        for stream in streams:
            stream.close()
        overlaps = pd.DataFrame(mask_overlaps(study, layout), columns=list(OVERLAP_COLUMNS))
        for name, table in (_tables(gathered, results) | {"overlap.csv": overlaps}).items():
            write_table(folder / name, table, index=False)
    write_record(folder / MANIFEST, _manifest(study, layout, folder, gathered))
    text = f"collected {len(results)} rows: {folder / 'results.csv'}"
    return "\n".join([text, *_notes(gathered, results)])


def _checked(study: Study, layout: Layout, gathered: Gathered) -> pd.DataFrame:
    """The result rows with their marks. Raises UsageError as `collect`."""
    results = gathered.results.table()
    if results.empty:
        raise UsageError(
            f"{layout.root}: no finished evaluation of the study '{study.study}' found"
        )
    results = mark_missed_budgets(mark_weak_attacks(results))
    if contradictions := find_contradictions(results):
        raise UsageError("\n".join(f"{layout.root}: {line}" for line in contradictions))
    return results


def _tables(gathered: Gathered, results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables by file name, without those that are written while they are read."""
    return {
        "results.csv": results,
        "results.parquet": results,
        "outcomes.parquet": gathered.outcomes.table([*NETWORK_KEY, *OUTCOME_COLUMNS]),
        "layers.csv": gathered.layers.table(),
        "curves.csv": gathered.curves.table(),
        "weights.csv": gathered.histogram.table(),
        "sanity_checks.csv": gathered.sanity_checks.table(),
        "corruptions.csv": gathered.corruptions.table([*NETWORK_KEY, *CORRUPTION_COLUMNS]),
        "failures.csv": gathered.failures.table([*CELL_KEY, "reason"]),
    }


def _notes(gathered: Gathered, results: pd.DataFrame) -> list[str]:
    """Lines about rows of other code, failed trainings and missing evaluations."""
    notes = []
    if others := int((results.other_code != "").sum()):
        notes.append(f"{others} rows were made by older or changed code: see the column other_code")
    notes += [f"failed: {reason}" for reason in gathered.failures.table(["reason"]).reason]
    return notes + [f"missing, printed as n/a: {name}" for name in gathered.missing]


def _manifest(study: Study, layout: Layout, folder: Path, gathered: Gathered) -> dict[str, Any]:
    """The fingerprint of the tables, and a checksum of each table and each file of outcomes."""
    flags = (
        layout.flags(cell, selection)
        for cell in study.cells()
        for selection in study.evaluation.selections
    )
    known = gathered.outcome_files
    return {
        "fingerprint": fingerprints.collected(study).plan,
        "tables": {name: file_checksum(folder / name) for name in COLLECTED if name != MANIFEST},
        "outcomes": {
            path.relative_to(layout.root).as_posix(): known.get(path) or file_checksum(path)
            for path in flags
            if path in known or path.exists()
        },
    }
