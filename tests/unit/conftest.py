"""Fixtures of the unit tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.datasets import Part
from robsparse.schema.threat import Crafting
from robsparse.study import loading
from robsparse.study.study import Study
from robsparse.training import objectives
from robsparse.training.stages import Run

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
def row_values():
    """A valid result row as plain values."""
    return {
        "dataset": "digits",
        "arch": "small_cnn",
        "method": "bcs",
        "objective": "at",
        "sparsity": 0.9,
        "seed": 0,
        "selection": "last",
        "attack": "pgd",
        "component": "all",
        "accuracy": 0.75,
        "n_correct": 15,
        "n_examples": 20,
        "ci_low": 0.531,
        "ci_high": 0.888,
        "norm": "Linf",
        "eps": 8 / 255,
        "sparsity_reached": 0.9,
        "nonzero": 100,
        "prunable": 1000,
        "layers": 4,
        "dense_macs": 5000,
        "sparse_macs": 500,
        "model_bytes": 4096,
        "settings_digest": "d",
        "code_version": "0.1.0",
        "code_digest": "k",
        "code_dirty": False,
        "libraries": "torch=2",
        "data_checksum": "c",
        "model_checksum": "m",
    }


@pytest.fixture
def study_data(tiny: dict[str, Any]) -> dict[str, Any]:
    """A study with a dense cell and a sparse cell for each method. It trains in under a second."""
    tiny["grid"] |= {"methods": ["bcs", "lwm"], "seeds": [0], "sparsities": [0.9]}
    tiny["datasets"]["digits"] |= {"validation_examples": 20, "test_examples": 800}
    tiny["training"] |= {"batch_size": 64, "precision": "fp32"}  # the same results on every machine
    tiny["training"]["crafting"]["precision"] = "fp32"
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
        return loading.load(path)

    return load


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[dict[str, Any] | str], str]:
    """refused(data or text) -> the error message for an invalid study, without the file name.

    A message with several lines has the name in each of them.
    """

    def load(content: dict[str, Any] | str) -> str:
        path = tmp_path / "bad.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        with pytest.raises(UsageError) as caught:
            loading.load(path)
        lines = str(caught.value).split("\n")
        assert all(line.startswith(f"{path}: ") for line in lines), lines
        return "\n".join(line.removeprefix(f"{path}: ") for line in lines)

    return load


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """make_run(model, sparsity, seed=0) -> the run that the hooks of a stage get."""

    def make(model: nn.Module, sparsity: float, seed: int = 0) -> Run:
        return Run(model, sparsity, torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def known_network() -> tuple[nn.Module, Part]:
    """A small adversarially trained network, and images that it classifies correctly.

    At an eps of 0.1 some of the 200 images withstand every attack and some do not.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        params = registry.entry("arch", "small_cnn").params(width=8)
        model = models.build("small_cnn", params, (1, 8, 8), 10)
        centres = 0.2 + 0.6 * torch.rand(10, 1, 8, 8, generator=generator)
        y = torch.arange(10).repeat(24)
        x = (centres[y] + 0.35 * torch.randn(240, 1, 8, 8, generator=generator)).clamp(0, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        attacker = objectives.Attacker(0.1, Crafting(steps=3, step_size=0.05), generator)
        for _ in range(40):
            optimizer.zero_grad()
            objectives.at(model.train(), x, y, attacker, 0.0).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right = (model.eval()(x).argmax(1) == y).nonzero().squeeze(1)[:200]
    return model, Part(x[right], y[right])
