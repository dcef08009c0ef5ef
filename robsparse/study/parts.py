"""The named parts of a study with their parameters filled in, and what their names stand for.

No torch in here.
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
    """A block of the grid: the product of its lists, dense networks once a seed.

    key: how messages name it, "grid" or "grid.1".
    params: hyperparameters that the block sets itself, merged over those of the section methods.
    training: its own, merged over the section training if `own_training`, else that section's.
    left_out: whether the file `where_exists` is missing, so that the block adds no cell.
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
        """How messages name the settings that its networks are trained with."""
        return f"{self.key}.training" if self.own_training else "training"


@dataclass(frozen=True)
class Parts:
    """A study file with the parameters of every named part filled in. Nothing of it changes.

    study: the name, of results/<study>. grid: all blocks, those that are left out too.
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
        """A line for each block that is left out."""
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
        """The registered name behind a name of the study: itself, unless it is a variant."""
        return base_of(self.params_of(kind), name)

    def entry(self, kind: PartKind, name: str) -> registry.Entry:
        """The registered part behind a name."""
        return registry.entry(kind, self.base(kind, name))

    def label(self, kind: PartKind, name: str) -> str:
        """Printed name of a part; of an attack, with what its settings change of its meaning."""
        if kind == "method" and self.is_external(name):
            return self.models[name].label or name
        if kind == "arch" and name not in self.archs:
            return name  # of a network that is not built from an arch
        own = getattr(self.params_of(kind).get(name), "label", None)
        printed = own or self.entry(kind, name).literals.get("LABEL", name)
        qualifier = self.qualifier(name) if kind == "attack" else ""
        return f"{printed} ({qualifier})" if qualifier else printed

    def qualifier(self, attack: str) -> str:
        """How an attack's settings differ from what its name stands for; "" if they do not."""
        return getattr(self.attack_params.get(attack), "qualifier", "")

    def source(self, method: str) -> Source:
        """Where the networks of a method come from."""
        return self.models[method].source if method in self.models else Source()

    def is_external(self, method: str) -> bool:
        """Whether the name stands for an external model."""
        return method in self.models

    def is_dense(self, method: str) -> bool:
        """Whether a method does not prune, and so has no sparsities."""
        if method in self.models:
            return self.models[method].sparsity == 0
        return self.entry("method", method).literals.get("DENSE", False)

    def start_method(self, method: str) -> str | None:
        """The method whose networks `method` starts from, if any; a variant may name its own."""
        return None if method in self.models else start_of(self.methods, method)

    def starting_cell(self, cell: Cell) -> Cell | None:
        """The cell whose trained weights `cell` starts from, or None if it starts from scratch."""
        start = self.start_method(cell.method)
        if start is None:
            return None
        return Cell(cell.dataset, cell.arch, start, cell.objective, 0.0, cell.seed)

    def settings(self) -> dict[str, Any]:
        """All that the study file decides, defaults included, as JSON holds it; not the machine."""
        sections = {field.name: getattr(self, field.name) for field in fields(Parts)}
        for name in ("machine", "attack_params"):
            del sections[name]
        sections["grid"] = [_settings_of(block) for block in self.grid]
        sections["evaluation"] = dict(self.evaluation) | {"attacks": dict(self.attack_params)}
        return to_jsonable_python({k: _plain(v) for k, v in sections.items()})


def base_of(params: Mapping[str, Any], name: str) -> str:
    """The registered name behind a name: its variant's base, or itself."""
    return getattr(params.get(name), "base", name)


def start_of(methods: Mapping[str, Any], method: str) -> str | None:
    """The method whose networks a method starts from; methods: their parameters by name."""
    own = getattr(methods.get(method), "starts_from", None)
    return own or registry.entry("method", base_of(methods, method)).literals.get("STARTS_FROM")


def _settings_of(block: Block) -> dict[str, Any]:
    values = {field.name: _plain(getattr(block, field.name)) for field in fields(Block)}
    for name in ("key", "own_training", "left_out"):
        del values[name]
    return values | {"training": block.training if block.own_training else None}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
