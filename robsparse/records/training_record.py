"""The record of one training run: JSON with cost, curve and checksums of weights."""

from pathlib import Path
from typing import Any

from robsparse.base.errors import UsageError
from robsparse.base.files import read_json


def read_training(path: Path) -> dict[str, Any]:
    """Read the record of one training run.

    Raises:
        UsageError: if the file is missing or damaged, or if an older version wrote it.
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
