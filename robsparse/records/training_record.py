"""The record of one training: a JSON file with its cost, its curve and checksums of its weights."""

from pathlib import Path
from typing import Any

from robsparse.base.errors import UsageError
from robsparse.base.files import read_json


def read_training(path: Path) -> dict[str, Any]:
    """The record of one training.

    Raises UsageError when the file is missing, damaged or was written by an older version.
    """
    content = read_json(path)
    cost, curve = content.get("cost"), content.get("curve", [])
    if (cost and "peak_active_weights" not in cost) or any(
        "active_weights" not in point for point in curve
    ):
        raise UsageError(
            f"{path}: no column 'active_weights': another version of robsparse trained this "
            "network; train it again"
        )
    return content
