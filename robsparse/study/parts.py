"""The named parts of a study with all their parameters, and the meaning of their names.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from robsparse.base import registry
from robsparse.schema.evaluation import Evaluation
from robsparse.schema.external import External, Source
from robsparse.schema.fields import Strict
from robsparse.schema.grid import Budget, Table
from robsparse.schema.imagesets import Images
from robsparse.schema.machine import Machine
from robsparse.schema.threat import Threat
from robsparse.schema.training import Objective, Training
from robsparse.study.cells import Cell

PartKind = Literal["dataset", "arch", "method", "attack"]


@dataclass(frozen=True)
class Block:
    """A block of the grid: all combinations of its lists; a dense network once for each seed.

    key: name of the block in messages, "grid" or "grid.1".
    params: the methods with hyperparameters set in the block; all their hyperparameters, with those
        of the block over those of the section methods.
    training: the training settings of the block.
    own_training: whether the block overrides the section training; if not, `training` is that
        section.
    left_out: whether the file `where_exists` is missing. The block then adds no cell.
    """

    key: str
    datasets: tuple[str, ...]
    archs: tuple[str, ...]
    objectives: tuple[Objective, ...]
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    params: Mapping[str, Strict]
    training: Training
    own_training: bool
    budget: Budget | None
    where_exists: str | None
    left_out: bool

    @property
    def training_key(self) -> str:
        """Name of its training settings in messages."""
        return f"{self.key}.training" if self.own_training else "training"


@dataclass(frozen=True)
class Parts:
    """A study file with all parameters of every named part. It never changes.

    study: the name of the study, and of the folder results/<study>.
    grid: all blocks, also those that are left out.
    """

    study: str
    title: str
    small: bool
    grid: tuple[Block, ...]
    datasets: Mapping[str, Images]
    archs: Mapping[str, Strict]
    methods: Mapping[str, Strict]
    models: Mapping[str, External]
    threat: Threat
    training: Training
    evaluation: Evaluation
    attack_params: Mapping[str, Strict]
    machine: Machine
    tables: tuple[Table, ...]

    @property
    def blocks(self) -> list[Block]:
        """The blocks that are not left out."""
        return [block for block in self.grid if not block.left_out]

    def left_out(self) -> list[str]:
        """A message for each block that is left out."""
        return [
            f"left out: {', '.join([*b.datasets, *b.archs, *b.objectives])} "
            f"(there is no {b.where_exists})"
            for b in self.grid
            if b.left_out
        ]

    def params_of(self, kind: PartKind) -> Mapping[str, Strict]:
        """The parameters of all parts of a kind, by name."""
        return {
            "dataset": self.datasets,
            "arch": self.archs,
            "method": self.methods,
            "attack": self.attack_params,
        }[kind]

    def base(self, kind: PartKind, name: str) -> str:
        """The registered name: the base of a variant, or the name itself."""
        return base_of(self.params_of(kind), name)

    def entry(self, kind: PartKind, name: str) -> registry.Entry:
        """The registered part that a name stands for."""
        return registry.entry(kind, self.base(kind, name))

    def label(self, kind: PartKind, name: str) -> str:
        """Printed name of a part; the name of an attack has its qualifier in brackets."""
        if kind == "method" and self.is_external(name):
            return self.models[name].label or name
        if kind == "arch" and name not in self.archs:
            return name  # the arch of a network that foreign code builds
        own = getattr(self.params_of(kind).get(name), "label", None)
        printed = own or self.entry(kind, name).literals.get("LABEL", name)
        qualifier = self.qualifier(name) if kind == "attack" else ""
        return f"{printed} ({qualifier})" if qualifier else printed

    def qualifier(self, attack: str) -> str:
        """How an attack differs from the attack that its name stands for; "" if it does not."""
        return getattr(self.attack_params.get(attack), "qualifier", "")

    def source(self, method: str) -> Source:
        """Where the networks of a method come from."""
        return self.models[method].source if method in self.models else Source()

    def is_external(self, method: str) -> bool:
        """Whether the name stands for an external model."""
        return method in self.models

    def is_dense(self, method: str) -> bool:
        """Whether a method does not prune. Such a method has no sparsities."""
        if method in self.models:
            return self.models[method].sparsity == 0
        return self.entry("method", method).literals.get("DENSE", False)

    def sparsity_of(self, method: str, sparsity: float) -> float:
        """The sparsity of a method's networks in a comparison at `sparsity`: 0 if it is dense."""
        return 0.0 if self.is_dense(method) else sparsity

    def start_method(self, method: str) -> str | None:
        """The method that trains the networks that `method` starts from; None if there is none."""
        return None if method in self.models else start_of(self.methods, method)

    def starting_cell(self, cell: Cell) -> Cell | None:
        """The cell with the weights that `cell` starts from; None if it is trained from scratch."""
        start = self.start_method(cell.method)
        if start is None:
            return None
        return Cell(cell.dataset, cell.arch, start, cell.objective, 0.0, cell.seed)

    def settings(self) -> dict[str, Any]:
        """All settings of the study with defaults, as JSON values; without the section machine."""
        sections = {field.name: getattr(self, field.name) for field in fields(Parts)}
        for name in ("machine", "attack_params"):
            del sections[name]
        sections["grid"] = [_settings_of(block) for block in self.grid]
        sections["evaluation"] = dict(self.evaluation) | {"attacks": dict(self.attack_params)}
        return to_jsonable_python({k: _plain(v) for k, v in sections.items()})


def base_of(params: Mapping[str, Any], name: str) -> str:
    """The registered name: the base of a variant, or the name itself."""
    return getattr(params.get(name), "base", name)


def start_of(methods: Mapping[str, Any], method: str) -> str | None:
    """The method that trains the networks that `method` starts from; None if there is none.

    methods: parameters of all methods by name. A variant may set `starts_from`.
    """
    own = getattr(methods.get(method), "starts_from", None)
    return own or registry.entry("method", base_of(methods, method)).literals.get("STARTS_FROM")


def _settings_of(block: Block) -> dict[str, Any]:
    values = {field.name: _plain(getattr(block, field.name)) for field in fields(Block)}
    for name in ("key", "own_training", "left_out"):
        del values[name]
    return values | {"training": block.training if block.own_training else None}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
