"""Fixtures of all tests. Tests never write into the checkout; they write to tmp_path."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from project import Project

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


@pytest.fixture(scope="session")
def project_at(repository: Path) -> Callable[[Path], Project]:
    """project_at(folder) -> a Project with copies of the workflow's files."""

    def make(folder: Path) -> Project:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / "Snakefile", folder)
        for name in ("rules", "config", "profiles", "report"):
            shutil.copytree(repository / name, folder / name)
        return Project(folder)

    return make


@pytest.fixture
def project(tmp_path: Path, project_at: Callable[[Path], Project]) -> Project:
    """A project of this test alone."""
    return project_at(tmp_path / "project")
