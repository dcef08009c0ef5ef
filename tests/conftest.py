"""Fixtures of all tests. Tests never write into the checkout; they write to tmp_path."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

# The same forms of convolutions on every machine, without a measurement.
os.environ.setdefault("ROBSPARSE_COSTS", "estimated")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def tiny() -> dict[str, Any]:
    """config/tiny.yaml as plain data, to be changed by a test and written elsewhere."""
    return yaml.safe_load((ROOT / "config" / "tiny.yaml").read_text())
