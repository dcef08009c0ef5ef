"""The files of one evaluation: the JSON record, and the outcomes of single images."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt

from robsparse.base import files
from robsparse.records.checked import Checked, check
from robsparse.records.rows import Row

_AGAIN = "evaluate this network again"


class _Layer(Checked):
    layer: str
    size: NonNegativeInt
    nonzero: NonNegativeInt
    positions: NonNegativeInt


class _Bin(Checked):
    low: float
    high: float
    count: NonNegativeInt


class _Corruption(Checked):
    corruption: str
    severity: int
    source: str
    n_correct: NonNegativeInt
    n_examples: NonNegativeInt


class _Content(Checked):
    rows: Annotated[list[Row], Field(min_length=1)]
    layers: list[_Layer]
    histogram: list[_Bin]
    sanity_checks: dict[str, float]
    outcomes: str
    corruptions: list[_Corruption]


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
    files.write_record(path, {"rows": rows, **rest})


def read_record(path: Path) -> Record:
    """Read the record of one evaluation.

    Raises:
        UsageError: if the file is damaged or of another version. The message names the key.
    """

    def parse(content: dict[str, Any]) -> Record:
        rows = check(_Content, content, path, _AGAIN).rows
        return Record(rows, *(content[f.name] for f in dataclasses.fields(Record)[1:]))

    return files.read_record(path, parse, _AGAIN)


_PICTURES = (".pictures", ".pictured", ".predicted")


def read_flags(path: Path, pictures: bool = True) -> dict[str, Any]:
    """Read the outcomes of single images of one evaluation: arrays by name.

    Args:
        path: the file.
        pictures: whether to read the adversarial images too; they are most of the file.

    Raises:
        UsageError: if the file is damaged.
    """
    left_out = () if pictures else _PICTURES
    return files.read_arrays(path, "run `robsparse evaluate` again", left_out)
