"""The study configuration: what is trained, on what, attacked how. No torch in here.

`load` reads one YAML file and either returns a `Study` or raises UsageError with one line a fault.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError

from robsparse import faults, registry
from robsparse.cells import Cell
from robsparse.errors import UsageError
from robsparse.fields import Radius, Share, Sparsity, Strict

Selection = Literal["best_val", "last"]
Objective = Literal["natural", "at", "trades"]


Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


class Fit(Strict):
    """How one stage is optimised: SGD with momentum, a learning-rate schedule, weight decay.

    decay: "coupled" adds weight_decay*w to the gradient (torch SGD); "sgdw" shrinks every trained
    tensor by (1 - weight_decay * lr / lr_0) before the step and is *not* multiplied by lr, as in
    the optimiser of the BCS authors (equal to "coupled" in steady state when lr is 0.1
    and momentum 0.9).
    """

    epochs: PositiveInt
    lr: PositiveFloat
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    milestones: tuple[Share, ...] = Field(
        (0.5, 0.75), description="step schedule: shares of all steps after which lr drops"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step schedule: factor of each drop")
    momentum: Share = 0.9
    weight_decay: float = Field(1e-4, ge=0)
    decay: Literal["coupled", "sgdw"] = "coupled"


class Threat(Strict):
    """The adversary that models are trained against and attacked with."""

    norm: Literal["Linf"] = "Linf"
    eps: Radius = Field(description="radius in [0,1] pixel units, a number or a ratio like 8/255")


class Crafting(Strict):
    """Inner maximisation of training: PGD with `steps` steps of `step_size`."""

    steps: PositiveInt = 10
    step_size: Radius
    bn_mode: Literal["eval", "train"] = Field(
        "eval", description="mode of batch norm while crafting (ADMM's authors: train)"
    )


class Validation(Strict):
    """Robust accuracy on held-out training images, by which `best_val` is selected."""

    steps: PositiveInt = 10
    every: PositiveInt = Field(1, description="epochs between two validations")


class Training(Strict):
    """What every method shares while it trains."""

    batch_size: PositiveInt = 128
    crafting: Crafting
    beta: PositiveFloat = Field(6.0, description="weight of the KL term of TRADES")
    validation: Validation = Validation()


def each_once(values: list[Any]) -> list[Any]:
    """Return the list as it is; a repeated entry is a fault of the config."""
    if len(set(values)) != len(values):
        raise PydanticCustomError("repeat", "expected each entry once", {})
    return values


class Grid(Strict):
    """The cells of the study: the product of these lists (dense is trained once a seed)."""

    datasets: list[str] = Field(min_length=1)
    archs: list[str] = Field(min_length=1)
    objectives: list[Objective] = Field(min_length=1)
    methods: list[str] = Field(min_length=1)
    sparsities: list[Sparsity] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)

    @field_validator("datasets", "archs", "objectives", "methods", "sparsities", "seeds")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        return each_once(values)


class Evaluation(Strict):
    """Which attacks see which saved weights, on how many test images."""

    n_examples: PositiveInt = Field(description="the first n images of the test split")
    batch_size: PositiveInt = 250
    seed: Seed = 0
    selections: dict[Selection, list[str]] = Field(
        min_length=1, description="attacks to run on the weights of each selection"
    )
    attacks: dict[str, Any] = Field(default_factory=dict)

    @field_validator("selections")
    @classmethod
    def _no_repeats(cls, selections: dict[str, list[str]]) -> dict[str, list[str]]:
        for names in selections.values():
            each_once(names)
        return selections


class Machine(Strict):
    """Where jobs run. None of it changes what is computed, only how fast."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt = Field(1, description="CPU threads of one job")
    memory_mb: PositiveInt = Field(2000, description="memory that a job asks a cluster for")
    minutes: PositiveInt = Field(60, description="run time that a job asks a cluster for")
    rerun_on_code_change: bool = Field(
        False, description="let a change of the code that trains or attacks start jobs again"
    )


class Study(Strict):
    """One configuration file, validated, with the parameters of every named part filled in."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="names results/<study>")
    title: str
    small: bool = Field(False, description="label every table and plot as a small study")
    grid: Grid
    datasets: dict[str, Any] = Field(default_factory=dict)
    archs: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, Any] = Field(default_factory=dict)
    threat: Threat
    training: Training
    evaluation: Evaluation
    machine: Machine = Machine()

    def cells(self) -> list[Cell]:
        """Every cell the study trains, dense starting points included, in a fixed order."""
        grid, found = self.grid, {}
        for dataset in grid.datasets:
            for arch in grid.archs:
                for objective in grid.objectives:
                    for seed in grid.seeds:
                        for method in grid.methods:
                            for sparsity in self._sparsities(method):
                                cell = Cell(dataset, arch, method, objective, sparsity, seed)
                                start = starting_cell(cell)
                                found |= {c: None for c in (start, cell) if c is not None}
        return list(found)

    def _sparsities(self, method: str) -> list[float]:
        dense = registry.entry("method", method).literals.get("DENSE", False)
        return [0.0] if dense else self.grid.sparsities

    def training_settings(self, cell: Cell) -> dict[str, Any]:
        """All settings that decide the weights of `cell`, those of its starting cell included."""
        start = starting_cell(cell)
        return {
            "cell": cell.key,
            "dataset": self.datasets[cell.dataset].model_dump(mode="json"),
            "arch": self.archs[cell.arch].model_dump(mode="json"),
            "method": self.methods[cell.method].model_dump(mode="json"),
            "threat": self.threat.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "start": self.training_settings(start) if start else None,
        }

    def evaluation_settings(self, cell: Cell, selection: Selection) -> dict[str, Any]:
        """All settings that decide the outcome of attacking `cell`, its training included."""
        attacks = {
            name: self.evaluation.attacks[name].model_dump(mode="json")
            for name in self.evaluation.selections[selection]
        }
        return {
            "training": self.training_settings(cell),
            "selection": selection,
            "evaluation": self.evaluation.model_dump(
                mode="json", include={"n_examples", "batch_size", "seed"}
            ),
            "attacks": attacks,
        }


def starting_cell(cell: Cell) -> Cell | None:
    """The cell whose trained weights `cell` starts from, or None if it starts from scratch."""
    start = registry.entry("method", cell.method).literals.get("STARTS_FROM")
    if start is None:
        return None
    return Cell(cell.dataset, cell.arch, start, cell.objective, 0.0, cell.seed)


def digest(settings: dict[str, Any]) -> str:
    """Short SHA-256 of settings, stable across machines and key order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def load(path: str | Path) -> Study:
    """Read and validate a study.

    Raises UsageError naming file, key, value, what was expected and the nearest match.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=faults.UniqueKeyLoader)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the config ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    try:
        return _fill_in(Study.model_validate(data), data)
    except ValidationError as error:
        raise UsageError(
            "\n".join(f"{path}: {line}" for line in faults.lines(error, data))
        ) from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _fill_in(study: Study, data: dict[str, Any]) -> Study:
    """Replace the mappings of named parts by their validated models, defaults filled in."""
    wanted_methods = dict.fromkeys(study.grid.methods)
    for method in study.grid.methods:
        start = _entry("method", method, "grid.methods").literals.get("STARTS_FROM")
        wanted_methods |= {start: None} if start else {}
    # Clean accuracy is always measured: attacks see only what is classified correctly.
    chosen = [name for names in study.evaluation.selections.values() for name in names]
    wanted_attacks = dict.fromkeys(["clean", *chosen])
    evaluation = study.evaluation.model_copy(
        update={
            "attacks": _parts(
                "attack",
                wanted_attacks,
                study.evaluation.attacks,
                "evaluation.selections",
                "evaluation.attacks",
            )
        }
    )
    study = study.model_copy(
        update={
            "datasets": _parts(
                "dataset", study.grid.datasets, study.datasets, "grid.datasets", "datasets"
            ),
            "archs": _parts("arch", study.grid.archs, study.archs, "grid.archs", "archs"),
            "methods": _parts("method", wanted_methods, study.methods, "grid.methods", "methods"),
            "evaluation": evaluation,
        }
    )
    _check_test_size(study)
    return study


def _check_test_size(study: Study) -> None:
    """Say before anything is trained that there are fewer test images than asked for."""
    for name in study.grid.datasets:
        size = getattr(study.datasets[name], "test_examples", None)
        if size is not None and study.evaluation.n_examples > size:
            raise UsageError(
                f"evaluation.n_examples = {study.evaluation.n_examples}: expected at most "
                f"datasets.{name}.test_examples; nearest match: {size}"
            )


def _parts(kind: str, wanted: Any, given: dict[str, Any], grid_key: str, key: str) -> dict:
    for name in given:
        _entry(kind, name, key)
    parts = {}
    for name in dict.fromkeys([*wanted, *given]):
        model = _entry(kind, name, grid_key).params
        values = {} if given.get(name) is None else given[name]
        try:
            parts[name] = model.model_validate(values)
        except ValidationError as error:
            raise UsageError("; ".join(faults.lines(error, values, f"{key}.{name}"))) from None
    return parts


def _entry(kind: str, name: str, key: str) -> registry.Entry:
    try:
        return registry.entry(kind, name)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
