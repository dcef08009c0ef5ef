"""A small study for any registered method. It is trained once in a test run, in seconds."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from robsparse import datasets, models
from robsparse.base import registry
from robsparse.networks import weights
from robsparse.records.training_record import read_training
from robsparse.schema.training import Fit
from robsparse.study import loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study
from robsparse.training import loop

EPOCHS = 2
EPOCHS_TO_ADAPT = 5  # a method that adapts its sparsity needs a few validations first
# A method that does something every n steps or epochs. With n = 1, a method that does it only in
# step 0, or never in a short training, would pass.
EPOCHS_WITH_A_PERIOD, PERIOD = 4, 3


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def shrink(entry: registry.Entry, default_periods: bool = False) -> dict[str, Any]:
    """Return small Params of a method: few epochs for each stage, and short periods.

    default_periods: keep the periods of the method, which are longer than these stages.
    """
    periods = [name for name in entry.params.model_fields if name.endswith("_every")]
    epochs = EPOCHS_WITH_A_PERIOD if periods and not default_periods else EPOCHS
    epochs = EPOCHS_TO_ADAPT if entry.literals.get("ADAPTS_SPARSITY") else epochs
    stages = [name for name, default in entry.params() if isinstance(default, Fit)]
    values: dict[str, Any] = {name: {"epochs": epochs} for name in stages}
    return values | ({} if default_periods else dict.fromkeys(periods, PERIOD))


@dataclass(frozen=True)
class Case:
    """A cell of a small study, with functions to train it and to read its results."""

    study: Study
    cell: Cell

    @property
    def batches(self) -> int:
        """Training steps of an epoch."""
        examples = len(datasets.load(self.cell.dataset, self.study.datasets["digits"]).train)
        return examples // self.study.training.batch_size

    @property
    def steps(self) -> int:
        """All training steps, without those of the starting cell."""
        method = registry.load("method", self.cell.method)
        stages = method.stages(self.study.methods[self.cell.method])
        return self.batches * sum(stage.fit.epochs for stage in stages)

    def starts(self) -> list[Cell]:
        """The cells that must be trained before this cell, in order."""
        found: list[Cell] = []
        cell = self.study.starting_cell(self.cell)
        while cell is not None:
            found.insert(0, cell)
            cell = self.study.starting_cell(cell)
        return found

    def train(self, layout: Layout, **options: Any) -> Layout:
        loop.train_cell(self.study, self.cell, layout, device="cpu", **options)
        return layout

    def network(self, layout: Layout, selection: str) -> torch.nn.Module:
        """A plain network with the exported weights, in eval mode."""
        splits = datasets.load(self.cell.dataset, self.study.datasets["digits"])
        params = self.study.archs[self.cell.arch]
        model = models.build(self.cell.arch, params, splits.image_shape, splits.classes)
        weights.load_into(model, layout.model(self.cell, selection))
        return model.eval()

    def results(self, layout: Layout) -> dict[str, Any]:
        """All results of a run, without its time and memory."""
        record = read_training(layout.training(self.cell))
        for name in ("seconds", "peak_memory_mb"):
            del record["cost"][name]
        return {
            "best_val": layout.model(self.cell, "best_val").read_bytes(),
            "last": layout.model(self.cell, "last").read_bytes(),
            "steps": pd.read_parquet(layout.steps(self.cell)).to_csv(),
            "lifetimes": pd.read_parquet(layout.lifetimes(self.cell)).to_csv(),
            "record": record,
        }


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """case(method, seed=0, sparsity=0.9, objective="at", ...) -> Case; see `make`."""
    folder = tmp_path_factory.mktemp("studies")

    @functools.cache
    def make(
        method: str,
        *,
        seed: int = 0,
        sparsity: float = 0.9,
        objective: str = "at",
        pattern: str = "",
        default_periods: bool = False,
    ) -> Case:
        names = registry.names("method")
        data = {
            "study": "contract",
            "title": "Contract test",
            "grid": {
                "datasets": ["digits"],
                "archs": ["small_cnn"],
                "objectives": [objective],
                "methods": names,
                "sparsities": [sparsity],
                "seeds": [seed],
            },
            "datasets": {"digits": {"validation_examples": 300, "test_examples": 800}},
            "archs": {"small_cnn": {"width": 4}},
            "threat": {"eps": 0.1},
            "training": {
                "batch_size": 128,
                "crafting": {"steps": 2, "step_size": 0.05, "precision": "fp32"},
                "precision": "fp32",  # the same results on every machine
                "validation": {"steps": 2},
            },
            "methods": {
                name: shrink(registry.entry("method", name), default_periods) for name in names
            },
            "evaluation": {"n_examples": 10, "selections": {"last": ["clean"]}},
        }
        for name in names if pattern else ():
            if "pattern" in registry.entry("method", name).params.model_fields:
                data["methods"][name]["pattern"] = pattern
        if objective == "rst":
            extra = folder / "extra.npz"
            labels = np.arange(60) % 10
            np.savez(extra, images=np.repeat(labels, 64).reshape(60, 8, 8) / 9, labels=labels)
            data["training"]["rst_file"] = str(extra)
        others = f"{pattern.replace(':', '_')}-{default_periods}"
        path = folder / f"{objective}-{sparsity}-{seed}-{others}.yaml"
        path.write_text(yaml.safe_dump(data))
        study = loading.load(path)
        found = [cell for cell in study.cells() if cell.method == method]
        return Case(study, found[0])

    return make


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, case: Callable[..., Case]
) -> Callable[..., tuple[Case, Layout]]:
    """trained(method, ...) -> the case and the folder of its uninterrupted training."""

    @functools.cache
    def train(method: str, **options: Any) -> tuple[Case, Layout]:
        made = case(method, **options)
        layout = Layout(tmp_path_factory.mktemp(method))
        for start in made.starts():
            _copy(start, train(start.method, **options)[1], layout)
        return made, made.train(layout)

    return train


@pytest.fixture
def prepared(
    tmp_path: Path, trained: Callable[..., tuple[Case, Layout]]
) -> Callable[..., tuple[Case, Layout]]:
    """prepared(method, ...) -> the case and a new folder with only its starting weights."""

    def prepare(method: str, **options: Any) -> tuple[Case, Layout]:
        made, source = trained(method, **options)
        layout = Layout(tmp_path / "run")
        for start in made.starts():
            _copy(start, source, layout)
        return made, layout

    return prepare


def _copy(cell: Cell, source: Layout, target: Layout) -> None:
    shutil.copytree(source.training(cell).parent, target.training(cell).parent, dirs_exist_ok=True)
