"""The history of single connections while a method rewires: prunings, regrowths and ages."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from robsparse.records.columns import LIFETIME_COLUMNS, STEP_COLUMNS

# Pending steps are processed when there are this many, or when their lists are this long.
STEPS_AT_ONCE, POSITIONS_AT_ONCE = 256, 1 << 20


class ConnectionLog:
    """A log of the active connections of every layer at every step.

    Ages are in training steps. A connection of the initial network is active since step 0. A row of
    the log covers `every` steps. Its columns `pruned` and `regrown` are sums over these steps. Its
    columns `active` and `age` describe the last of them.

    A position is an index into the weights of all layers, one layer after the other. The position
    after the last weight is padding. A method with lists of a fixed length fills them with padding,
    and no table counts it. Many steps are processed together. The time depends only on the number
    of changed connections. The CPU never waits for the GPU.
    """

    def __init__(self, active: dict[str, Tensor], every: int = 1) -> None:
        """Start from the masks of the active connections of each layer (bool, any shape)."""
        self.names, self.every, self.step = list(active), every, 0
        device = next(iter(active.values())).device
        padding = torch.full((1,), -1, dtype=torch.int32, device=device)
        # For each connection: the step at which it became active, or -1 if it is dormant.
        since = [mask.flatten().to(torch.int32) - 1 for mask in active.values()]
        self.active_since = torch.cat([*since, padding])
        self.ends = torch.tensor([mask.numel() for mask in active.values()]).cumsum(0).to(device)
        # For each layer and the padding: the numbers of connections pruned so far, regrown so far
        # and active now, and the sum of the steps at which the active ones became active.
        self.totals = torch.zeros(len(active) + 1, 4, dtype=torch.float64, device=device)
        self.totals[:-1, 2] = torch.stack([mask.sum() for mask in active.values()])
        self.pruned_at_age = torch.zeros(1024, dtype=torch.int64, device=device)
        self.rows: list[Tensor] = [self.totals[:-1]]
        # The pruned and the regrown positions of each step that is not yet processed.
        self.length = 0
        self.pending: list[Tensor] = []

    def record(self, pruned: Tensor, regrown: Tensor) -> None:
        """Add one step: the pruned positions and the regrown positions (int64)."""
        self.step += 1
        self.pending += [pruned, regrown]
        self.length += len(pruned) + len(regrown)
        if self.length >= POSITIONS_AT_ONCE or len(self.pending) >= 2 * STEPS_AT_ONCE:
            self._process()

    def record_by_layer(self, pruned: list[Tensor], regrown: list[Tensor]) -> None:
        """Add one step. The lists hold, for each layer, flat positions inside this layer."""
        starts = [0, *self.ends.tolist()]
        both = (
            torch.cat([part + start for part, start in zip(positions, starts, strict=False)])
            for positions in (pruned, regrown)
        )
        self.record(*both)

    def _process(self) -> None:
        """Process the pending steps. Their events are sorted by position and then by time."""
        pending, self.pending, self.length = self.pending, [], 0
        if not pending:
            return
        first, steps = self.step - len(pending) // 2 + 1, len(pending) // 2
        kinds = [torch.full_like(positions, i) for i, positions in enumerate(pending)]
        position, order = torch.cat(pending).sort(stable=True)
        # 0: pruned at the first step, 1: regrown at the first step, 2: pruned at the second, ...
        kind = torch.cat(kinds)[order]
        step, prunes = first + kind // 2, kind % 2 == 0
        # A pruned connection became active at the previous event of its position, if there is one.
        again = position[1:] == position[:-1]
        since = self.active_since[position].long()
        since[1:] = torch.where(again, step[:-1], since[1:])
        self._count(steps, (kind // 2, position), prunes, torch.where(prunes, -since, step))
        padding = len(self.active_since) - 1
        self._count_lifetimes((step - since) * (prunes & (since > 0) & (position < padding)))
        # Only the last event at a position is stored. All others are written to the padding.
        last = position.clone()
        last[:-1].masked_fill_(again, padding)
        self.active_since.index_copy_(0, last, step.masked_fill(prunes, -1).int())
        self.active_since[-1:].fill_(-1)

    def _count(
        self, steps: int, where: tuple[Tensor, Tensor], prunes: Tensor, since: Tensor
    ) -> None:
        """Add events to the totals of each step, and store the rows of the logged steps."""
        step, position = where
        layer = torch.bucketize(position, self.ends, right=True)
        change = torch.stack([prunes, ~prunes, 1 - 2 * prunes.long(), since], dim=1).double()
        cells = change.new_zeros(steps * len(self.totals), 4)
        cells.index_add_(0, step * len(self.totals) + layer, change)
        totals = cells.view(steps, len(self.totals), 4).cumsum(0) + self.totals
        self.totals = totals[-1].clone()
        last = self.step // self.every * self.every
        ends = range(steps - 1 - self.step + last, -1, -self.every)
        self.rows += [totals[i, :-1].clone() for i in reversed(ends)]

    def _count_lifetimes(self, ages: Tensor) -> None:
        """Count the ages at which regrown connections were pruned. Age 0 means any other event."""
        while self.step >= len(self.pruned_at_age):
            self.pruned_at_age = torch.cat(
                [self.pruned_at_age, torch.zeros_like(self.pruned_at_age)]
            )
        self.pruned_at_age.index_add_(0, ages, torch.ones_like(ages))
        self.pruned_at_age[:1].zero_()

    def steps(self) -> pa.Table:
        """Return one row for each logged step and layer. Step 0 is the initial network."""
        self._process()
        values = torch.stack(self.rows).cpu()  # rows x layers x totals
        steps = torch.arange(len(self.rows), dtype=torch.int32) * self.every
        active, since = values[:, :, 2:3], values[:, :, 3:]
        changes = values[:, :, :2].diff(dim=0, prepend=values[:1, :, :2])
        mean = since / active.clamp(min=1)
        age = torch.where(active > 0, steps[:, None, None] - mean, torch.nan)
        layers = torch.arange(len(self.names), dtype=torch.int32).repeat(len(self.rows))
        columns = [
            steps.repeat_interleave(len(self.names)).numpy(),
            pa.DictionaryArray.from_arrays(layers.numpy(), self.names),
            *torch.cat([changes, active], dim=2).flatten(0, 1).int().T.numpy(),
            pa.array(age.flatten().numpy(), from_pandas=True),  # NaN is written as "no value"
        ]
        return pa.table(columns, names=list(STEP_COLUMNS))

    def lifetimes(self) -> pa.Table:
        """Return the numbers of pruned and of active regrown connections at each age."""
        self._process()
        since = self.active_since.cpu()
        ages = (self.step - since[since > 0]).long()
        active = torch.bincount(ages, minlength=len(self.pruned_at_age)).numpy()
        pruned = np.zeros_like(active)
        pruned[: len(self.pruned_at_age)] = self.pruned_at_age.cpu()
        (age,) = ((pruned > 0) | (active > 0)).nonzero()
        return pa.table([age, pruned[age], active[age]], names=list(LIFETIME_COLUMNS))

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        self._process()
        return {
            "names": self.names,
            "sizes": self.ends.diff(prepend=self.ends.new_zeros(1)).tolist(),
            "every": self.every,
            "step": self.step,
            "active_since": self.active_since,
            "totals": self.totals,
            "pruned_at_age": self.pruned_at_age,
            "rows": torch.stack(self.rows),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> "ConnectionLog":
        """Return the log that returned `state`."""
        since = state["active_since"].to(device)
        layers = (since[:-1] >= 0).split(state["sizes"])
        log = cls(dict(zip(state["names"], layers, strict=True)), state["every"])
        log.step, log.active_since, log.totals = state["step"], since, state["totals"].to(device)
        log.pruned_at_age = state["pruned_at_age"].to(device)
        log.rows = [*state["rows"].to(device)]
        return log


def empty_steps() -> pa.Table:
    """Return the log of a method that never rewires."""
    return pa.table({name: pa.nulls(0) for name in STEP_COLUMNS})


def empty_lifetimes() -> pa.Table:
    """Return the lifetimes of a method that never rewires."""
    return pa.table({name: pa.nulls(0) for name in LIFETIME_COLUMNS})
