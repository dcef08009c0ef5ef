"""What the unit tests share: quiet, light, repeatable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from torch import nn

from robsparse import config
from robsparse.config import Study
from robsparse.stages import Run

settings.register_profile(
    "unit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def study_data(tiny: dict[str, Any]) -> dict[str, Any]:
    """A study of one dense and one sparse cell a method that trains in a fraction of a second."""
    tiny["grid"] |= {"methods": ["bcs", "lwm"], "seeds": [0], "sparsities": [0.9]}
    tiny["datasets"]["digits"] |= {"validation_examples": 20, "test_examples": 800}
    tiny["training"] |= {"batch_size": 64}
    for params in tiny["methods"].values():
        for value in params.values():
            if isinstance(value, dict):
                value["epochs"] = 1
    tiny["evaluation"]["selections"] = {"last": ["clean", "pgd"]}
    return tiny


@pytest.fixture
def load_study(tmp_path: Path) -> Callable[[dict[str, Any]], Study]:
    """Write plain data as YAML and load it as a user would."""

    def load(data: dict[str, Any]) -> Study:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(data))
        return config.load(path)

    return load


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """make_run(model, sparsity, seed=0) -> what the hooks of a stage get."""

    def make(model: nn.Module, sparsity: float, seed: int = 0) -> Run:
        return Run(model, sparsity, torch.Generator().manual_seed(seed))

    return make
