"""The record of one training run: JSON with cost, curve and checksums of its files."""

from pathlib import Path
from typing import Any

from pydantic import Field

from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, read_record
from robsparse.records.checked import Checked, check

_AGAIN = "train this network again"


class _Point(Checked):
    """A point of the curve. All its other values are numbers."""

    __pydantic_extra__: dict[str, float | None] = Field(init=False)
    epoch: int
    stage: str = ""
    active_weights: int


class _Cost(Checked):
    __pydantic_extra__: dict[str, float] = Field(init=False)
    device: str = ""


class _Selected(Checked):
    __pydantic_extra__: dict[str, float] = Field(init=False)
    epoch: int | None


class _Content(Checked):
    cost: _Cost | None
    curve: list[_Point]
    selected: dict[str, _Selected] = Field(default_factory=dict)
    failure: str = ""
    imported: dict[str, Any] | None = None
    data_checksum: str = ""
    code_digest: str = ""
    weights: dict[str, str] = Field(default_factory=dict)
    tables: dict[str, str] = Field(default_factory=dict)


def read_training(path: Path) -> dict[str, Any]:
    """Read the record of one training run.

    Raises:
        UsageError: if the file is missing or damaged, or if an older version wrote it. The message
            names the wrong key.
    """

    def parse(content: dict[str, Any]) -> dict[str, Any]:
        if {"cost", "curve"} <= content.keys():
            _check_version(content, path)
        check(_Content, content, path, _AGAIN)
        return content

    return read_record(path, parse, _AGAIN)


def _check_version(content: dict[str, Any], path: Path) -> None:
    """Raise UsageError if an older version of robsparse, with other names, wrote the record."""
    cost, curve = content["cost"], content["curve"]
    points = curve if isinstance(curve, list) else []
    if (isinstance(cost, dict) and cost and "peak_active_weights" not in cost) or any(
        isinstance(point, dict) and "active_weights" not in point for point in points
    ):
        raise UsageError(
            f"{path}: no column 'active_weights': another version of robsparse trained this "
            "network; train it again"
        )


def check_weights(training: Path, selection: str, weights: Path) -> None:
    """Raise UsageError if weights are not those that the training of this record saved.

    Args:
        training: the record. Without a record nothing is checked.
        selection: which saved weights.
        weights: their file.
    """
    if not training.exists():
        return
    saved = read_training(training).get("weights", {}).get(selection)
    if saved is not None and file_checksum(weights) != saved:
        raise UsageError(
            f"{weights}: damaged or changed, these are not the weights that training saved "
            f"({training.name}); delete the file and train this network again"
        )
