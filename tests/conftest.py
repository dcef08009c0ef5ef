"""Fixtures of all tests. Tests never write into the checkout; they write to tmp_path."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
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


@pytest.fixture(scope="session")
def load_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """load_benchmark("digests") -> the module benchmarks/digests.py, which is no part of a package.

    Until the end of the session it is in sys.modules, where dataclasses look their module up.
    """
    loaded = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


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
