"""Resolves the settings of every network of a study. Imports no torch.

This module decides which settings of study, block and variant apply to a cell, which norm and eps
each adversary has, and how long the stages are. Training, crafting, evaluation, sanity checks,
`robsparse plan` and the fingerprints read the result.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from robsparse.base.counts import round_to_sum
from robsparse.base.errors import UsageError
from robsparse.schema.evaluation import Selection
from robsparse.schema.external import ELSEWHERE, External
from robsparse.schema.fields import Strict, rounded_sparsity
from robsparse.schema.imagesets import Augmentation
from robsparse.schema.threat import AttackParams, Crafting, Norm, Threat
from robsparse.schema.training import Fit, Training
from robsparse.study import messages
from robsparse.study.cells import Cell
from robsparse.study.cost import passes_per_epoch
from robsparse.study.parts import Block, Parts, base_of


@dataclass(frozen=True)
class Attack:
    """One attack of a study.

    name: its name in the study.
    base: its registered name.
    norm, eps: those of the attack if it sets them, else those of the threat. eps is 0 for an attack
        that does not perturb images.
    """

    name: str
    base: str
    params: Strict
    norm: Norm
    eps: float

    @property
    def surrogate(self) -> str | None:
        """The method of the surrogate network of a black-box transfer attack; None for others."""
        return getattr(self.params, "surrogate", None)


@dataclass(frozen=True)
class PlannedCell:
    """The resolved settings of a cell.

    params: the hyperparameters of its method, with stages scaled to the budget of the block. For an
        external model, its External.
    training: its training settings, from the block or the study.
    training_threat: norm and eps of training and validation.
    augmentation: augmentation of its training images.
    attacks: the attacks on the weights of each selection. The first one is always clean accuracy.
    sanity_check_threat: norm and eps of the sanity checks.
    """

    params: Strict
    training: Training
    training_threat: Threat
    augmentation: Augmentation
    attacks: Mapping[Selection, tuple[Attack, ...]]
    sanity_check_threat: Threat

    @property
    def crafting(self) -> Crafting:
        """Settings of crafting."""
        return self.training.crafting

    @property
    def stages(self) -> dict[str, Fit]:
        """The stages of training by name, in the order of the hyperparameters."""
        return stages_of(self.params)


def trained_against(threat: Threat, training: Training) -> Threat:
    """The threat of training: the norm of the study, and the eps of `training` if it sets one."""
    return threat if training.eps is None else threat.model_copy(update={"eps": training.eps})


def planned_attacks(params: Mapping[str, Strict], threat: Threat) -> dict[str, Attack]:
    """Attacks by name, with resolved norm and eps."""
    found = {}
    for name, own in params.items():
        norm, eps = threat.norm, 0.0
        if isinstance(own, AttackParams):
            norm, eps = own.norm or norm, own.eps or threat.eps
        found[name] = Attack(name, base_of(params, name), own, norm, eps)
    return found


class Plan(Mapping[Cell, PlannedCell]):
    """The networks of a study: trained ones, also those that others start from, and external ones.

    The order is fixed. A cell is found and resolved when it is asked for, without the other cells:
    a job on one network takes the same time in a study of any size.

    Raises:
        UsageError: from `plan[cell]`: if two blocks give the cell different settings, or if a
            budget is too small for its method.
    """

    def __init__(self, parts: Parts, attacks: Mapping[str, Attack]) -> None:
        self._parts = parts
        self._attacks = {
            selection: tuple(attacks[name] for name in dict.fromkeys(["clean", *names]))
            for selection, names in parts.evaluation.selections.items()
        }
        self._external = {
            Cell(m.dataset, _arch_of(parts, m), name, m.objective, m.sparsity, 0): m
            for name, m in parts.models.items()
        }
        self._resolved: dict[Cell, PlannedCell] = {}
        self._alike: dict[tuple[str, ...], PlannedCell] = {}

    def __getitem__(self, cell: Cell) -> PlannedCell:
        if cell not in self._resolved:
            self._resolved[cell] = self._resolve(cell)
        return self._resolved[cell]

    def __iter__(self) -> Iterator[Cell]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __contains__(self, cell: object) -> bool:
        return isinstance(cell, Cell) and (cell in self._external or bool(self._blocks_of(cell)))

    def networks(
        self, dataset: str, method: str, sparsity: float, arch: str | None, objective: str | None
    ) -> Iterator[Cell]:
        """The networks with these axes, in the fixed order; None: all archs, all objectives."""
        for block in self._parts.blocks:
            if dataset in block.datasets and _trains(self._parts, block, method, sparsity):
                archs = [name for name in block.archs if arch in (None, name)]
                objectives = [name for name in block.objectives if objective in (None, name)]
                for place in itertools.product(archs, objectives, block.seeds):
                    yield Cell(dataset, place[0], method, place[1], sparsity, place[2])
        for cell in self._external:
            named = (cell.dataset, cell.method, cell.sparsity) == (dataset, method, sparsity)
            if named and arch in (None, cell.arch) and objective in (None, cell.objective):
                yield cell

    @functools.cached_property
    def _cells(self) -> dict[Cell, None]:
        """All cells. Only what needs every network reads it: checks, `collect`, the workflow."""
        trained = (cell for block in self._parts.blocks for cell in _cells_of(self._parts, block))
        return dict.fromkeys(itertools.chain(trained, self._external))

    def _blocks_of(self, cell: Cell) -> list[Block]:
        """The blocks that train a cell, or a network that starts from it."""
        return [
            block
            for block in self._parts.blocks
            if cell.dataset in block.datasets
            and cell.arch in block.archs
            and cell.objective in block.objectives
            and cell.seed in block.seeds
            and _trains(self._parts, block, cell.method, cell.sparsity)
        ]

    def _resolve(self, cell: Cell) -> PlannedCell:
        if cell in self._external:
            return self._planned(cell, self._external[cell], self._parts.training)
        found = [self._in_block(cell, block) for block in self._blocks_of(cell)]
        if not found:
            raise KeyError(cell)
        first, *others = found
        if any(other is not first and other != first for other in others):
            raise UsageError(f"grid: the cell {cell.key} is in two blocks with different settings")
        return first

    def _in_block(self, cell: Cell, block: Block) -> PlannedCell:
        """The settings of a cell in a block; arch, sparsity and seed do not change them."""
        kind = (block.key, cell.dataset, cell.method, cell.objective)
        if kind not in self._alike:
            params = _within_budget(self._parts, cell, block)
            self._alike[kind] = self._planned(cell, params, block.training)
        return self._alike[kind]

    def _planned(self, cell: Cell, params: Strict, training: Training) -> PlannedCell:
        return PlannedCell(
            params,
            training,
            trained_against(self._parts.threat, training),
            training.augmentation or self._parts.datasets[cell.dataset].augmentation,
            self._attacks,
            self._parts.threat,
        )


def _trains(parts: Parts, block: Block, method: str, sparsity: float) -> bool:
    """Whether a block trains a method at a sparsity, also as the start of another method."""
    if method in block.methods:
        asked = (0.0,) if parts.is_dense(method) else block.sparsities
        if sparsity in map(rounded_sparsity, asked):
            return True
    return sparsity == 0 and any(parts.start_method(name) == method for name in block.methods)


def _cells_of(parts: Parts, block: Block) -> list[Cell]:
    found = []
    for dataset, arch, objective, seed in itertools.product(
        block.datasets, block.archs, block.objectives, block.seeds
    ):
        for method in block.methods:
            for sparsity in [0.0] if parts.is_dense(method) else block.sparsities:
                cell = Cell(dataset, arch, method, objective, sparsity, seed)
                start = parts.starting_cell(cell)
                found += [start, cell] if start else [cell]
    return found


def _arch_of(parts: Parts, model: External) -> str:
    """The arch of an external model, which decides the table that it is printed in.

    An external model may set the arch. Otherwise it is the arch of the other networks of the same
    data set and objective, if they all have the same arch; else ELSEWHERE.
    """
    if model.arch is not None:
        return model.arch
    beside = {
        arch
        for block in parts.grid
        if model.dataset in block.datasets and model.objective in block.objectives
        for arch in block.archs
    } | {
        other.arch
        for other in parts.models.values()
        if (other.dataset, other.objective) == (model.dataset, model.objective) and other.arch
    }
    return beside.pop() if len(beside) == 1 else ELSEWHERE


def _params_of(parts: Parts, method: str, block: Block) -> Strict:
    return block.params.get(method, parts.methods[method])


def _within_budget(parts: Parts, cell: Cell, block: Block) -> Strict:
    """The hyperparameters of a cell, with stages scaled to the budget of the block."""
    params = _params_of(parts, cell.method, block)
    if block.budget is None or parts.is_dense(cell.method):
        return params
    start, before = parts.starting_cell(cell), 0
    if start:
        stages = stages_of(_params_of(parts, start.method, block))
        before = sum(fit.epochs for fit in stages.values())
    total = block.budget.total
    if block.budget.unit == "passes":
        total = _affordable_epochs(cell, block, stages_of(params), before)
    key = f"{block.key}.budget.total = {block.budget.total}"
    if total - before < len(stages_of(params)):
        raise UsageError(
            f"{key}: allows {total} epochs, expected at least {before + len(stages_of(params))} "
            f"for '{cell.method}'"
        )
    scaled = _scaled(stages_of(params), total - before)
    try:  # validate again: for example, a warm-up must not be longer than its stage
        return type(params).model_validate(_set_values(params) | scaled)
    except ValidationError as error:
        line = messages.lines(error, scaled)[0]
        raise UsageError(f"{key}: does not fit '{cell.method}': {line}") from None


def _affordable_epochs(cell: Cell, block: Block, stages: dict[str, Fit], before: int) -> int:
    """The number of epochs in a budget of passes, with the `before` epochs of the starting cell."""
    assert block.budget is not None
    budget, each = block.budget.total, passes_per_epoch(cell.objective, block.training)
    further = {
        name: passes_per_epoch(cell.objective, block.training, fit) - each
        for name, fit in stages.items()
    }

    def spent(total: int) -> float:
        scaled = _scaled(stages, total - before)
        return total * each + sum(further[name] * fit["epochs"] for name, fit in scaled.items())

    total = int(budget / each)
    while any(further.values()) and total - before > len(stages) and spent(total) > budget:
        total -= 1
    return total


def _scaled(stages: dict[str, Fit], total: int) -> dict[str, dict[str, Any]]:
    """The settings of stages, scaled in proportion to `total` epochs; each has at least one."""
    free, whole = total - len(stages), sum(fit.epochs for fit in stages.values())
    shares = {name: fit.epochs / whole * free for name, fit in stages.items()}
    counts = round_to_sum(shares, dict.fromkeys(stages, total), free)
    return {name: _set_values(fit) | {"epochs": 1 + counts[name]} for name, fit in stages.items()}


def _set_values(model: Strict) -> dict[str, Any]:
    """The values that were set, without defaults: a validator may check whether a value was set."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def stages_of(params: Strict) -> dict[str, Fit]:
    """The stages among the hyperparameters of a method, by name."""
    return {name: value for name, value in params if isinstance(value, Fit)}
