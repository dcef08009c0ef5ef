"""A study as its configuration describes it: which networks it has, and what decides each of them.

No torch in here.
"""

import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from robsparse.base import registry
from robsparse.base.counts import round_to_sum
from robsparse.base.errors import UsageError
from robsparse.schema.fields import Name, Strict
from robsparse.schema.sections import (
    OWN_FOLDERS,
    Evaluation,
    External,
    Fit,
    Grid,
    Machine,
    Selection,
    Table,
    Threat,
    Training,
)
from robsparse.schema.sources import ELSEWHERE, Source
from robsparse.study import faults
from robsparse.study.cells import Cell, Layout
from robsparse.study.cost import passes_per_epoch


class Study(Strict):
    """One configuration file, validated, with the parameters of every named part filled in.

    `grid` is one block or a list of blocks. In datasets, archs, methods and evaluation.attacks a
    new name may stand for a variant of a registered one: {base: NAME, label: TEXT, parameters...}.
    """

    study: Name = Field(description="names results/<study>")
    title: str
    small: bool = Field(False, description="label every table and plot as a small study")
    grid: list[Grid] = Field(default_factory=list)
    datasets: dict[Name, Any] = Field(default_factory=dict)
    archs: dict[Name, Any] = Field(default_factory=dict)
    methods: dict[Name, Any] = Field(default_factory=dict)
    models: dict[Name, External] = Field(
        default_factory=dict, description="networks that were trained elsewhere"
    )
    threat: Threat
    training: Training
    evaluation: Evaluation
    machine: Machine = Machine()
    tables: list[Table] = Field(
        default_factory=list, description="tables beside the main one, such as those of a paper"
    )

    @field_validator("grid", mode="before")
    @classmethod
    def _one_block(cls, grid: Any) -> Any:
        return [grid] if isinstance(grid, dict) else grid

    @field_validator("study")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name.lower() in OWN_FOLDERS:
            raise PydanticCustomError(
                "taken", "expected another name: results/{name} is no study's", {"name": name}
            )
        return name

    def blocks(self) -> list[Grid]:
        """The blocks whose `where_exists` is there."""
        return [b for b in self.grid if b.where_exists is None or os.path.exists(b.where_exists)]

    def key_of(self, block: Grid) -> str:
        """How a fault names a block of the grid."""
        return f"grid.{self.grid.index(block)}" if len(self.grid) > 1 else "grid"

    def left_out(self) -> list[str]:
        """A line for each block that is left out."""
        return [
            f"left out: {', '.join([*b.datasets, *b.archs, *b.objectives])} "
            f"(there is no {b.where_exists})"
            for b in self.grid
            if b not in self.blocks()
        ]

    def cells(self) -> list[Cell]:
        """Every cell the study trains, dense starting points included, in a fixed order."""
        return list(self.planned)

    @functools.cached_property
    def planned(self) -> dict[Cell, "Planned"]:
        """Each cell with the hyperparameters of its method and how it is trained."""
        found: dict[Cell, Planned] = {}
        for block in self.blocks():
            training = block.training or self.training
            for cell in self._cells_of(block):
                params = self._within_budget(cell, self._params_of(cell.method, block), block)
                plan = Planned(params, training)
                if found.setdefault(cell, plan) != plan:
                    raise UsageError(
                        f"grid: the cell {cell.key} stands in two blocks with different settings"
                    )
        for name, model in self.models.items():
            arch = self._arch_of(model)
            cell = Cell(model.dataset, arch, name, model.objective, model.sparsity, 0)
            found[cell] = Planned(model, self.training)
        return found

    def _arch_of(self, model: External) -> str:
        """The arch of a network from elsewhere: its own, or the one in whose table it stands.

        Foreign code may name one of the study's. Otherwise it is the only arch of the other
        networks of that data set and objective, or ELSEWHERE where they have several or none.
        """
        if model.arch is not None:
            return model.arch
        beside = {
            arch
            for block in self.grid
            if model.dataset in block.datasets and model.objective in block.objectives
            for arch in block.archs
        } | {
            other.arch
            for other in self.models.values()
            if (other.dataset, other.objective) == (model.dataset, model.objective) and other.arch
        }
        return beside.pop() if len(beside) == 1 else ELSEWHERE

    def _params_of(self, method: str, block: Grid) -> Strict:
        return block.params.get(method, self.methods[method])

    def _within_budget(self, cell: Cell, params: Strict, block: Grid) -> Strict:
        """The hyperparameters with epochs that cost what the block's budget allows."""
        if block.budget is None or self.is_dense(cell.method):
            return params
        total = block.budget.total
        if block.budget.unit == "passes":
            total = int(total / passes_per_epoch(cell.objective, block.training or self.training))
        start, before = self.starting_cell(cell), 0
        if start:
            fits = _fits(self._params_of(start.method, block))
            before = sum(fit.epochs for fit in fits.values())
        epochs = {name: fit.epochs for name, fit in _fits(params).items()}
        left = total - before
        key = f"{self.key_of(block)}.budget.total = {block.budget.total}"
        if left < len(epochs):
            raise UsageError(
                f"{key}: allows {total} epochs, expected at least {before + len(epochs)} for "
                f"'{cell.method}'"
            )
        shares = {
            name: n / sum(epochs.values()) * (left - len(epochs)) for name, n in epochs.items()
        }
        counts = round_to_sum(shares, dict.fromkeys(epochs, left), left - len(epochs))
        stages = {
            name: _given(fit) | {"epochs": 1 + counts[name]} for name, fit in _fits(params).items()
        }
        try:  # a warm-up, say, has to end within the new length
            return type(params).model_validate(_given(params) | stages)
        except ValidationError as error:
            fault = faults.lines(error, stages)[0]
            raise UsageError(f"{key}: does not suit '{cell.method}': {fault}") from None

    def _cells_of(self, block: Grid) -> list[Cell]:
        found = []
        for dataset, arch, objective, seed in itertools.product(
            block.datasets, block.archs, block.objectives, block.seeds
        ):
            for method in block.methods:
                for sparsity in [0.0] if self.is_dense(method) else block.sparsities:
                    cell = Cell(dataset, arch, method, objective, sparsity, seed)
                    start = self.starting_cell(cell)
                    found += [start, cell] if start else [cell]
        return found

    def base(self, kind: str, name: str) -> str:
        """The registered name behind a name of the study: itself, unless it is a variant."""
        return getattr(self._section(kind).get(name), "base", name)

    def source(self, method: str) -> Source:
        """Where the networks of a method come from."""
        return self.models[method].source if method in self.models else Source()

    def is_external(self, method: str) -> bool:
        """Whether the name stands for a network that was trained elsewhere."""
        return self.source(method).external

    def entry(self, kind: str, name: str) -> registry.Entry:
        """The registered part ("method", "attack", "dataset", "arch") behind a name."""
        return registry.entry(kind, self.base(kind, name))

    def label(self, kind: str, name: str) -> str:
        """Printed name of a part; of an attack, with what its settings change of its meaning."""
        if kind == "method" and self.is_external(name):
            return self.models[name].label or name
        if kind == "arch" and name not in self.archs:
            return name  # of a network that is not built from an arch
        own = getattr(self._section(kind).get(name), "label", None)
        printed = own or self.entry(kind, name).literals.get("LABEL", name)
        qualifier = self.qualifier(name) if kind == "attack" else ""
        return f"{printed} ({qualifier})" if qualifier else printed

    def qualifier(self, attack: str) -> str:
        """How an attack's settings differ from what its name stands for; "" if they do not."""
        return getattr(self.evaluation.attacks.get(attack), "qualifier", "")

    def _section(self, kind: str) -> dict[str, Any]:
        return self.evaluation.attacks if kind == "attack" else getattr(self, f"{kind}s")

    def is_dense(self, method: str) -> bool:
        """Whether a method does not prune, and so has no sparsities."""
        if self.is_external(method):
            return self.models[method].sparsity == 0
        return self.entry("method", method).literals.get("DENSE", False)

    def start_method(self, method: str) -> str | None:
        """The method whose networks `method` starts from, if any; a variant may name its own."""
        if self.is_external(method):
            return None
        own = getattr(self.methods.get(method), "starts_from", None)
        return own or self.entry("method", method).literals.get("STARTS_FROM")

    def training_of(self, cell: Cell) -> Training:
        """How `cell` is trained: the section training, or what its block says."""
        return self.planned[cell].training

    def training_threat(self, cell: Cell) -> Threat:
        """What `cell` is trained and validated against.

        eps: that of its block's training, else of the section training, else of the threat. The
        norm is the threat's.
        """
        return self.threat.adjusted(self.training_of(cell))

    def attack_threat(self, name: str) -> Threat:
        """How far an attack of the study may go: norm and eps of its own, else of the threat.

        The sanity checks of an evaluation go as far as the threat.
        """
        return self.threat.adjusted(self.evaluation.attacks[name])

    def starting_cell(self, cell: Cell) -> Cell | None:
        """The cell whose trained weights `cell` starts from, or None if it starts from scratch."""
        start = self.start_method(cell.method)
        if start is None:
            return None
        return Cell(cell.dataset, cell.arch, start, cell.objective, 0.0, cell.seed)

    def inputs(self, cell: Cell, layout: Layout) -> list[Path]:
        """Files of the study that must be there before `cell` is trained."""
        start = self.starting_cell(cell)
        return [layout.model(start, "last"), layout.training(start)] if start else []

    def fits(self, cell: Cell) -> dict[str, Fit]:
        """The stages of a cell that is trained, as its hyperparameters list them."""
        return _fits(self.planned[cell].params)

    def cells_of(self, table: Table) -> list[Cell]:
        """The networks of a table, one a place (seeds are averaged over).

        Raises UsageError when rows and columns put several networks in one place.
        """
        axes = ("dataset", "arch", "objective", "method", "sparsity")
        wanted = {axis: getattr(table, f"{axis}s") for axis in axes[:4]}
        found: dict[tuple, Cell] = {}
        for cell in self.cells():
            if all(not names or getattr(cell, axis) in names for axis, names in wanted.items()):
                place = tuple(getattr(cell, axis) for axis in (*table.rows, *table.columns))
                other = found.setdefault(place, cell)
                if any(getattr(cell, axis) != getattr(other, axis) for axis in axes):
                    raise UsageError(
                        f"'{table.name}': rows and columns put {other.key} and {cell.key} in one "
                        "place; expected another axis, or fewer networks"
                    )
        return list(found.values())

    def surrogate(self, cell: Cell, method: str) -> Cell:
        """The network of `method` that an attack on `cell` is crafted on: never the same one.

        Of the same data set; of the same arch and objective, and with the next seed, where there is
        one; dense or as sparse. Raises UsageError when there is no other network.
        """
        found = [
            other
            for sparsity in dict.fromkeys((0.0, cell.sparsity))
            for other in self._alike.get((cell.dataset, method, sparsity), [])
            if other != cell
        ]
        if not found:
            raise UsageError(
                f"evaluation.attacks: no network of '{method}' to transfer from to {cell.key}; "
                "expected a method of the grid, and a second seed for its own networks"
            )

        def apart(other: Cell) -> tuple:
            return (
                other.arch != cell.arch,
                other.objective != cell.objective,
                other.seed <= cell.seed,
                other.seed,
            )

        return min(found, key=apart)

    @functools.cached_property
    def _alike(self) -> dict[tuple[str, str, float], list[Cell]]:
        """Cells by data set, method and sparsity."""
        found: dict[tuple[str, str, float], list[Cell]] = {}
        for cell in self.cells():
            found.setdefault((cell.dataset, cell.method, cell.sparsity), []).append(cell)
        return found

    def surrogates(self, cell: Cell, selection: Selection) -> list[Cell]:
        """All networks besides its own that the attacks on a cell look at."""
        names = (
            getattr(self.evaluation.attacks[name], "surrogate", None)
            for name in self.evaluation.selections[selection]
        )
        return [self.surrogate(cell, name) for name in dict.fromkeys(names) if name]

    def attacks_of(self, selection: Selection) -> list[str]:
        """Attacks on the weights of a selection; clean accuracy is always measured, and first."""
        return list(dict.fromkeys(["clean", *self.evaluation.selections[selection]]))


@dataclasses.dataclass(frozen=True)
class Planned:
    """What decides a cell besides its name.

    params: the hyperparameters of its method, or the External itself.
    """

    params: Strict
    training: Training


def _given(model: Strict) -> dict[str, Any]:
    """The values that were given; what was left out stays out, for validators that ask for it."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def _fits(params: Strict) -> dict[str, Fit]:
    """The stages of a method, as its hyperparameters list them."""
    return {name: value for name, value in params if isinstance(value, Fit)}
