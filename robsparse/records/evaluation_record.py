"""The files of one evaluation: the JSON record, and the outcomes of single images."""

import dataclasses
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from robsparse.base.errors import UsageError
from robsparse.base.files import read_json, write_json
from robsparse.records.rows import Row


@dataclass(frozen=True)
class Record:
    """One evaluation.

    rows: result rows.
    layers: for each layer: layer, size, nonzero, positions.
    histogram: bins of |w| of the nonzero prunable weights: low, high, and the count of weights
        with a magnitude in [low, high).
    sanity_checks: numbers of robsparse.evaluation.sanity_checks.
    outcomes: checksum of the flags file, which has the outcomes of single images.
    corruptions: for each corruption and severity: corruption, severity, source, n_correct,
        n_examples. Empty if the evaluation has none.
    """

    rows: list[Row]
    layers: list[dict[str, Any]]
    histogram: list[dict[str, float]]
    sanity_checks: dict[str, float]
    outcomes: str
    corruptions: list[dict[str, Any]] = field(default_factory=list)


def write_record(path: Path, record: Record) -> None:
    """Write the record of one evaluation."""
    rows = [row.model_dump() for row in record.rows]
    rest = {key: value for key, value in vars(record).items() if key != "rows"}
    write_json(path, {"rows": rows, **rest})


def read_record(path: Path) -> Record:
    """Read the record of one evaluation.

    Raises:
        UsageError: if the file is damaged or of another version. The message names the field.
    """
    content = read_json(path)
    try:
        if not content["rows"]:
            raise UsageError(f"{path}: expected at least one row")
        rows = [Row.model_validate(row) for row in content["rows"]]
        return Record(rows, *(content[f.name] for f in dataclasses.fields(Record)[1:]))
    except (KeyError, TypeError):
        named = ", ".join(f.name for f in dataclasses.fields(Record))
        raise UsageError(f"{path}: expected {named}; evaluate this network again") from None
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in wrong["loc"])
        if wrong["type"] in ("extra_forbidden", "missing"):
            raise UsageError(
                f"{path}: '{key}': another version of robsparse wrote these columns; evaluate this "
                "network again"
            ) from None
        raise UsageError(f"{path}: {key} = {wrong['input']!r}: {wrong['msg']}") from None


def read_flags(path: Path) -> dict[str, Any]:
    """Read the outcomes of single images of one evaluation: arrays by name.

    Raises:
        UsageError: if the file is damaged.
    """
    import numpy as np  # noqa: PLC0415 (planning the workflow starts sooner without it)

    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: damaged ({error}); run `robsparse evaluate` again") from None
