"""Every network of a study with all that decides it, resolved once. No torch in here.

Training, crafting, evaluation, sanity checks, `robsparse plan` and the fingerprints read what is
resolved here: which settings of study, block and variant count, how far an adversary may go, and
how long the stages are.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from robsparse.base.counts import round_to_sum
from robsparse.base.errors import UsageError
from robsparse.schema.evaluation import Selection
from robsparse.schema.external import ELSEWHERE, External
from robsparse.schema.fields import Strict
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

    base: the registered name behind `name`. norm, eps: how far it may go, its own or those of the
    threat; an eps of 0 for what perturbs nothing.
    """

    name: str
    base: str
    params: Strict
    norm: Norm
    eps: float

    @property
    def surrogate(self) -> str | None:
        """The method whose network it is crafted on, for a black-box transfer attack."""
        return getattr(self.params, "surrogate", None)


@dataclass(frozen=True)
class PlannedCell:
    """What decides a cell besides its name.

    params: the hyperparameters of its method, lengthened or shortened to the block's budget; the
        External itself of an external model.
    training: the settings that it is trained with, its block's or the study's.
    training_threat: what it is trained and validated against.
    augmentation: how its training images are varied.
    attacks: the attacks on the weights of each selection; clean accuracy is always measured, first.
    sanity_check_threat: how far the sanity checks of an evaluation go.
    """

    params: Strict
    training: Training
    training_threat: Threat
    augmentation: Augmentation
    attacks: Mapping[Selection, tuple[Attack, ...]]
    sanity_check_threat: Threat

    @property
    def crafting(self) -> Crafting:
        """How training examples are crafted within the training threat."""
        return self.training.crafting

    @property
    def stages(self) -> dict[str, Fit]:
        """The stages of training, as the hyperparameters list them."""
        return stages_of(self.params)


def trained_against(threat: Threat, training: Training) -> Threat:
    """The norm of the study's threat, with the eps of the training settings if they have one."""
    return threat if training.eps is None else threat.model_copy(update={"eps": training.eps})


def planned_attacks(params: Mapping[str, Strict], threat: Threat) -> dict[str, Attack]:
    """Attacks by name, each with its own norm and eps, or else those of the threat."""
    found = {}
    for name, own in params.items():
        norm, eps = threat.norm, 0.0
        if isinstance(own, AttackParams):
            norm, eps = own.norm or norm, own.eps or threat.eps
        found[name] = Attack(name, base_of(params, name), own, norm, eps)
    return found


def planned_cells(parts: Parts, attacks: Mapping[str, Attack]) -> dict[Cell, PlannedCell]:
    """Every cell the study trains or takes in, starting points included, in a fixed order.

    Raises UsageError when two blocks give one cell different settings, and when a budget does not
    suit a method.
    """
    by_selection = {
        selection: tuple(attacks[name] for name in dict.fromkeys(["clean", *names]))
        for selection, names in parts.evaluation.selections.items()
    }

    def plan(cell: Cell, params: Strict, training: Training) -> PlannedCell:
        return PlannedCell(
            params,
            training,
            trained_against(parts.threat, training),
            training.augmentation or parts.datasets[cell.dataset].augmentation,
            by_selection,
            parts.threat,
        )

    found: dict[Cell, PlannedCell] = {}
    for block in parts.blocks:
        for cell in _cells_of(parts, block):
            params = _within_budget(parts, cell, block)
            planned = plan(cell, params, block.training)
            if found.setdefault(cell, planned) != planned:
                raise UsageError(
                    f"grid: the cell {cell.key} stands in two blocks with different settings"
                )
    for name, model in parts.models.items():
        arch = _arch_of(parts, model)
        cell = Cell(model.dataset, arch, name, model.objective, model.sparsity, 0)
        found[cell] = plan(cell, model, parts.training)
    return found


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
    """The arch of an external model: its own, or the one in whose table it stands.

    Foreign code may name one of the study's. Otherwise it is the only arch of the other
    networks of that data set and objective, or ELSEWHERE where they have several or none.
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
    """The hyperparameters of a cell, with epochs that cost what the block's budget allows."""
    params = _params_of(parts, cell.method, block)
    if block.budget is None or parts.is_dense(cell.method):
        return params
    total = block.budget.total
    if block.budget.unit == "passes":
        total = int(total / passes_per_epoch(cell.objective, block.training))
    start, before = parts.starting_cell(cell), 0
    if start:
        stages = stages_of(_params_of(parts, start.method, block))
        before = sum(fit.epochs for fit in stages.values())
    key = f"{block.key}.budget.total = {block.budget.total}"
    if total - before < len(stages_of(params)):
        raise UsageError(
            f"{key}: allows {total} epochs, expected at least {before + len(stages_of(params))} "
            f"for '{cell.method}'"
        )
    lengthened = _lengthened(stages_of(params), total - before)
    try:  # a warm-up, say, has to end within the new length
        return type(params).model_validate(_given(params) | lengthened)
    except ValidationError as error:
        line = messages.lines(error, lengthened)[0]
        raise UsageError(f"{key}: does not suit '{cell.method}': {line}") from None


def _lengthened(stages: dict[str, Fit], total: int) -> dict[str, dict[str, Any]]:
    """The settings of stages whose lengths add up to `total` epochs, in proportion, each >= 1."""
    free, whole = total - len(stages), sum(fit.epochs for fit in stages.values())
    shares = {name: fit.epochs / whole * free for name, fit in stages.items()}
    counts = round_to_sum(shares, dict.fromkeys(stages, total), free)
    return {name: _given(fit) | {"epochs": 1 + counts[name]} for name, fit in stages.items()}


def _given(model: Strict) -> dict[str, Any]:
    """The values that were given; what was left out stays out, for validators that ask for it."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def stages_of(params: Strict) -> dict[str, Fit]:
    """The stages of a method, as its hyperparameters list them."""
    return {name: value for name, value in params if isinstance(value, Fit)}
