"""What becomes of single connections while a method rewires: deaths, regrowths, ages, lifetimes."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robsparse.records.columns import LIFETIME_COLUMNS, STEP_COLUMNS

# Steps are taken in so many at a time, or when their lists together are this long.
STEPS_AT_ONCE, POSITIONS_AT_ONCE = 256, 1 << 20


class ConnectionLog:
    """Follows the live connections of every layer from step to step.

    Ages are in training steps; a connection of the initial network is born at step 0. A row of
    the log sums up `every` steps (pruned, regrown) or holds their end (active, age).

    A position counts through the layers' weights, one layer after the other. The one after the
    last stands for nowhere and is never in a table: a method whose lists have a fixed length
    fills them with it. Many steps are taken in together, at the cost of their changes, and the
    host never waits for the device.
    """

    def __init__(self, live: dict[str, Tensor], every: int = 1) -> None:
        """Start from the live sets (bool, any shape) of the layers, by name."""
        self.names, self.every, self.step = list(live), every, 0
        device = next(iter(live.values())).device
        nowhere = torch.full((1,), -1, dtype=torch.int32, device=device)
        # The step at which each connection was born, -1 where there is none.
        born = [mask.flatten().to(torch.int32) - 1 for mask in live.values()]
        self.born = torch.cat([*born, nowhere])
        self.ends = torch.tensor([mask.numel() for mask in live.values()]).cumsum(0).to(device)
        # Of each layer and of nowhere: all deaths and regrowths so far, live ones, their births.
        self.totals = torch.zeros(len(live) + 1, 4, dtype=torch.float64, device=device)
        self.totals[:-1, 2] = torch.stack([mask.sum() for mask in live.values()])
        self.died_at = torch.zeros(1024, dtype=torch.int64, device=device)
        self.rows: list[Tensor] = [self.totals[:-1]]
        # Died and regrown of each step that is not taken in yet.
        self.waiting: list[Tensor] = []
        self.length = 0

    def record(self, died: Tensor, regrown: Tensor) -> None:
        """Note one step: the positions (int64) that died and those that came alive."""
        self.step += 1
        self.waiting += [died, regrown]
        self.length += len(died) + len(regrown)
        if self.length >= POSITIONS_AT_ONCE or len(self.waiting) >= 2 * STEPS_AT_ONCE:
            self._take_in()

    def record_by_layer(self, died: list[Tensor], regrown: list[Tensor]) -> None:
        """Note one step given as each layer's own flat positions."""
        starts = [0, *self.ends.tolist()]
        both = (
            torch.cat([own + start for own, start in zip(positions, starts, strict=False)])
            for positions in (died, regrown)
        )
        self.record(*both)

    def _take_in(self) -> None:
        """Work off the steps that wait: events in order of position, and there of time."""
        waiting, self.waiting, self.length = self.waiting, [], 0
        if not waiting:
            return
        first, steps = self.step - len(waiting) // 2 + 1, len(waiting) // 2
        kinds = [torch.full_like(positions, i) for i, positions in enumerate(waiting)]
        position, order = torch.cat(waiting).sort(stable=True)
        kind = torch.cat(kinds)[order]  # 0: died at the first step, 1: regrown then, 2: died, ...
        step, dies = first + kind // 2, kind % 2 == 0
        # A connection that dies was born by the event before at its position, or before them all.
        again = position[1:] == position[:-1]
        birth = self.born[position].long()
        birth[1:] = torch.where(again, step[:-1], birth[1:])
        self._count(steps, (kind // 2, position), dies, torch.where(dies, -birth, step))
        nowhere = len(self.born) - 1
        self._count_lifetimes((step - birth) * (dies & (birth > 0) & (position < nowhere)))
        # The last event at a position decides; all others write to nowhere.
        last = position.clone()
        last[:-1].masked_fill_(again, nowhere)
        self.born.index_copy_(0, last, step.masked_fill(dies, -1).int())
        self.born[-1:].fill_(-1)

    def _count(
        self, steps: int, where: tuple[Tensor, Tensor], dies: Tensor, births: Tensor
    ) -> None:
        """Add events to the totals, step by step, and keep the rows that the log is to have."""
        step, position = where
        layer = torch.bucketize(position, self.ends, right=True)
        change = torch.stack([dies, ~dies, 1 - 2 * dies.long(), births], dim=1).double()
        cells = change.new_zeros(steps * len(self.totals), 4)
        cells.index_add_(0, step * len(self.totals) + layer, change)
        totals = cells.view(steps, len(self.totals), 4).cumsum(0) + self.totals
        self.totals = totals[-1].clone()
        last = self.step // self.every * self.every
        ends = range(steps - 1 - self.step + last, -1, -self.every)
        self.rows += [totals[i, :-1].clone() for i in reversed(ends)]

    def _count_lifetimes(self, ages: Tensor) -> None:
        """Add the ages of regrown connections that died; those of all else are 0."""
        while self.step >= len(self.died_at):
            self.died_at = torch.cat([self.died_at, torch.zeros_like(self.died_at)])
        self.died_at.index_add_(0, ages, torch.ones_like(ages))
        self.died_at[:1].zero_()

    def steps(self) -> pd.DataFrame:
        """One row a logged step and layer; those of step 0 are the initial network."""
        self._take_in()
        values = torch.stack(self.rows).cpu()  # rows x layers x totals
        steps = torch.arange(len(self.rows), dtype=torch.int32) * self.every
        live, births = values[:, :, 2:3], values[:, :, 3:]
        changes = values[:, :, :2].diff(dim=0, prepend=values[:1, :, :2])
        age = torch.where(live > 0, steps[:, None, None] - births / live.clamp(min=1), torch.nan)
        values = torch.cat([changes, live, age], dim=2)
        table = pd.DataFrame(values.flatten(0, 1).numpy(), columns=list(STEP_COLUMNS[2:]))
        table = table.astype(dict.fromkeys(("pruned", "regrown", "active"), "int32"))
        table.insert(0, "layer", pd.Categorical(self.names * len(self.rows), self.names))
        table.insert(0, "step", steps.repeat_interleave(len(self.names)).numpy())
        return table

    def lifetimes(self) -> pd.DataFrame:
        """Regrown connections by age: how many were pruned at it, how many are active with it."""
        self._take_in()
        born = self.born.cpu()
        ages = (self.step - born[born > 0]).long()
        active = torch.bincount(ages, minlength=len(self.died_at)).numpy()
        pruned = np.zeros_like(active)
        pruned[: len(self.died_at)] = self.died_at.cpu()
        table = pd.DataFrame({"age": np.arange(len(active)), "pruned": pruned, "active": active})
        return table[(table.pruned > 0) | (table.active > 0)].reset_index(drop=True)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        self._take_in()
        return {
            "names": self.names,
            "sizes": self.ends.diff(prepend=self.ends.new_zeros(1)).tolist(),
            "every": self.every,
            "step": self.step,
            "born": self.born,
            "totals": self.totals,
            "died_at": self.died_at,
            "rows": torch.stack(self.rows),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "ConnectionLog":
        """The log that `state` was taken from."""
        born = state["born"].to(device)
        layers = (born[:-1] >= 0).split(state["sizes"])
        log = cls(dict(zip(state["names"], layers, strict=True)), state["every"])
        log.step, log.born, log.totals = state["step"], born, state["totals"].to(device)
        log.died_at, log.rows = state["died_at"].to(device), [*state["rows"].to(device)]
        return log


def no_steps() -> pd.DataFrame:
    """The log of a method that never rewires."""
    return pd.DataFrame(columns=list(STEP_COLUMNS))


def no_lifetimes() -> pd.DataFrame:
    """The lifetimes of a method that never rewires."""
    return pd.DataFrame(columns=list(LIFETIME_COLUMNS))
