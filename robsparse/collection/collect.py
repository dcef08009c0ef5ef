"""Writes the collected tables of a study, and a manifest with their checksums."""

from pathlib import Path
from typing import Any

import pandas as pd

from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, write_record, write_table
from robsparse.collection.gather import CELL_KEY, NETWORK_KEY, Gathered, gather
from robsparse.collection.overlap import mask_overlaps
from robsparse.collection.plausibility import (
    find_contradictions,
    mark_missed_budgets,
    mark_weak_attacks,
)
from robsparse.records.columns import (
    COLLECTED,
    CORRUPTION_COLUMNS,
    LIFETIME_COLUMNS,
    MANIFEST,
    OUTCOME_COLUMNS,
    OVERLAP_COLUMNS,
    STEP_COLUMNS,
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
    gathered = gather(study, layout)
    if not gathered.rows:
        raise UsageError(
            f"{layout.root}: no finished evaluation of the study '{study.study}' found"
        )
    results = pd.DataFrame([row.model_dump() for row in gathered.rows])
    results["other_code"] = gathered.other_code
    results = mark_missed_budgets(mark_weak_attacks(results))
    if contradictions := find_contradictions(results):
        raise UsageError("\n".join(f"{layout.root}: {line}" for line in contradictions))
    overlaps = pd.DataFrame(mask_overlaps(study, layout), columns=list(OVERLAP_COLUMNS))
    for name, table in (_tables(gathered, results) | {"overlap.csv": overlaps}).items():
        write_table(folder / name, table, index=False)
    write_record(folder / MANIFEST, _manifest(study, layout, folder))
    text = f"collected {len(results)} rows: {folder / 'results.csv'}"
    return "\n".join([text, *_notes(gathered)])


def _tables(gathered: Gathered, results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables by file name."""
    return {
        "results.csv": results,
        "results.parquet": results,
        "outcomes.parquet": pd.DataFrame(
            gathered.outcomes, columns=[*NETWORK_KEY, *OUTCOME_COLUMNS]
        ),
        "layers.csv": pd.DataFrame(gathered.layers),
        "curves.csv": pd.DataFrame(gathered.curves),
        "weights.csv": pd.DataFrame(gathered.histogram),
        "sanity_checks.csv": pd.DataFrame(gathered.sanity_checks),
        "corruptions.csv": pd.DataFrame(
            gathered.corruptions, columns=[*NETWORK_KEY, *CORRUPTION_COLUMNS]
        ),
        "failures.csv": pd.DataFrame(gathered.failures, columns=[*CELL_KEY, "reason"]),
        "steps.parquet": _joined(gathered.steps, STEP_COLUMNS),
        "lifetimes.parquet": _joined(gathered.lifetimes, LIFETIME_COLUMNS),
    }


def _joined(tables: list[pd.DataFrame], columns: tuple[str, ...]) -> pd.DataFrame:
    """All tables in one table; an empty table with these columns if no method rewires."""
    return pd.concat(tables or [pd.DataFrame(columns=[*CELL_KEY, *columns])])


def _notes(gathered: Gathered) -> list[str]:
    """Lines about rows of other code, failed trainings and missing evaluations."""
    notes = []
    if others := sum(map(bool, gathered.other_code)):
        notes.append(f"{others} rows were made by older or changed code: see the column other_code")
    notes += [f"failed: {failure['reason']}" for failure in gathered.failures]
    return notes + [f"missing, printed as n/a: {name}" for name in gathered.missing]


def _manifest(study: Study, layout: Layout, folder: Path) -> dict[str, Any]:
    """The fingerprint of the tables, and a checksum of each table and each file of outcomes."""
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
