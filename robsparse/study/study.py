"""A resolved study: its parts and its networks. Imports no torch."""

import bisect
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from robsparse.base.errors import UsageError
from robsparse.schema.evaluation import Selection
from robsparse.schema.grid import Table
from robsparse.study.cells import Cell, Layout
from robsparse.study.parts import Parts
from robsparse.study.planned import Attack, Plan

AXES = ("dataset", "arch", "objective", "method", "sparsity")


@dataclass(frozen=True)
class Study(Parts):
    """A resolved study. Training, evaluation and figures read it.

    attacks: all attacks by name.
    planned: all cells with their resolved settings, in a fixed order.
    """

    attacks: Mapping[str, Attack]
    planned: Plan

    def cells(self) -> list[Cell]:
        """All trained networks and external models of the study, in a fixed order."""
        return list(self.planned)

    @functools.cached_property
    def by_group(self) -> dict[tuple[str, str, str], list[Cell]]:
        """All cells by data set, arch and objective, in the fixed order."""
        found: dict[tuple[str, str, str], list[Cell]] = {}
        for cell in self.cells():
            found.setdefault((cell.dataset, cell.arch, cell.objective), []).append(cell)
        return found

    def saved_selections(self) -> list[Selection]:
        """The selections that training saves: best_val, last, and best_clean if it is attacked."""
        listed: set[Selection] = {"best_val", "last", *self.evaluation.selections}
        return [selection for selection in get_args(Selection) if selection in listed]

    def inputs(self, cell: Cell, layout: Layout) -> list[Path]:
        """Files of the study that the training of `cell` needs."""
        start = self.starting_cell(cell)
        return [layout.model(start, "last"), layout.training(start)] if start else []

    def cells_of(self, table: Table) -> list[Cell]:
        """The networks of a table; one cell for all seeds of a field.

        Raises:
            UsageError: if rows and columns put several networks in one field.
        """
        wanted = {axis: getattr(table, f"{axis}s") for axis in AXES[:4]}
        found: dict[tuple[object, ...], Cell] = {}
        for cell in self.cells():
            if all(not names or getattr(cell, axis) in names for axis, names in wanted.items()):
                shown = self.place_in(table, cell)
                place = tuple(shown[axis] for axis in (*table.rows, *table.columns))
                other = found.setdefault(place, cell)
                if any(getattr(cell, axis) != getattr(other, axis) for axis in AXES):
                    raise UsageError(
                        f"'{table.name}': rows and columns put {other.key} and {cell.key} in one "
                        "field; expected another axis, or fewer networks"
                    )
        return list(found.values())

    def place_in(self, table: Table, cell: Cell) -> dict[str, Any]:
        """The axes of a network in a table. On axes in `as_base`, the base replaces a variant."""
        place = {axis: getattr(cell, axis) for axis in AXES}
        for axis in table.as_base:
            if axis == "dataset" or cell.arch in self.archs:
                place[axis] = self.base(axis, place[axis])
        return place

    def surrogate(self, cell: Cell, method: str) -> Cell:
        """The network of `method` on which a black-box transfer attack on `cell` is crafted.

        It is another network of the same data set, either dense or with the same sparsity. Networks
        with the same arch, the same objective and the next seed are preferred, in this order.

        Raises:
            UsageError: if there is no other network.
        """
        for arch, objective in itertools.product((cell.arch, None), (cell.objective, None)):
            found = self._by_seed(cell.dataset, method, cell.sparsity, arch, objective)
            after = bisect.bisect_right(found, cell.seed, key=lambda other: other.seed)
            for other in (*found[after : after + 1], *found[:2]):
                if other != cell:
                    return other
        raise UsageError(
            f"evaluation.attacks: no network of '{method}' as surrogate for {cell.key}; "
            "expected a method of the grid, and a second seed if it is the same method"
        )

    def _by_seed(
        self, dataset: str, method: str, sparsity: float, arch: str | None, objective: str | None
    ) -> list[Cell]:
        """The dense networks of a method and those with this sparsity, in the order of seeds."""
        place = (dataset, method, sparsity, arch, objective)
        if place not in self._sorted:
            found = dict.fromkeys(
                other
                for share in (0.0, sparsity)
                for other in self.planned.networks(dataset, method, share, arch, objective)
            )
            self._sorted[place] = sorted(found, key=lambda other: other.seed)
        return self._sorted[place]

    @functools.cached_property
    def _sorted(self) -> dict[tuple[str | float | None, ...], list[Cell]]:
        """The lists of `_by_seed` that were asked for."""
        return {}

    def surrogates(self, cell: Cell, selection: Selection) -> list[Cell]:
        """All surrogate networks of the attacks on a cell."""
        names = (attack.surrogate for attack in self.planned[cell].attacks[selection])
        return [self.surrogate(cell, name) for name in dict.fromkeys(names) if name]
