"""What becomes of single connections while a method rewires: deaths, regrowths, ages, lifetimes."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robsparse.records import LIFETIME_COLUMNS, STEP_COLUMNS


class ConnectionLog:
    """Follows the live connections of every layer from step to step.

    Ages are in training steps; a connection of the initial network is born at step 0. A row of
    the log sums up `every` steps (deaths, regrown) or holds their end (live, age).

    A position counts through the layers' weights, one layer after the other. The one after the
    last stands for nowhere and is never in a table: a method whose lists have a fixed length
    fills them with it. Taking in a step costs by its changes, and never makes the host wait for
    the device.
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
        # Of each layer and of nowhere: deaths, regrown, live, sum of the live ones' births.
        self.totals = torch.zeros(len(live) + 1, 4, dtype=torch.float64, device=device)
        self.totals[:-1, 2] = torch.stack([mask.sum() for mask in live.values()])
        self.died_at = torch.zeros(1024, dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.int64, device=device)
        self.rows: list[Tensor] = [self.totals[:-1].clone()]
        self.death = torch.tensor([[1.0, 0.0, -1.0, 0.0]], dtype=torch.float64, device=device)
        self.regrowth = torch.tensor([[0.0, 1.0, 1.0, 0.0]], dtype=torch.float64, device=device)

    def record(self, died: Tensor, regrown: Tensor) -> None:
        """Take in one step: the positions (int64) that died and those that came alive."""
        self.step += 1
        if len(died):
            births = self.born.index_select(0, died)
            self.born.index_fill_(0, died, -1)
            layer = torch.bucketize(died, self.ends, right=True)
            self.totals.index_add_(0, layer, self.death.expand(len(died), 4))
            self.totals[:, 3].index_add_(0, layer, births.double(), alpha=-1)
            self._count_lifetimes(births)
        if len(regrown):
            self.born.index_fill_(0, regrown, self.step)
            self.born[-1:].fill_(-1)
            layer = torch.bucketize(regrown, self.ends, right=True)
            self.regrowth[:, 3].fill_(self.step)
            self.totals.index_add_(0, layer, self.regrowth.expand(len(regrown), 4))
        if self.step % self.every == 0:
            self.rows.append(self.totals[:-1].clone())
            self.totals[:, :2].zero_()

    def record_by_layer(self, died: list[Tensor], regrown: list[Tensor]) -> None:
        """Take in one step given as each layer's own flat positions."""
        starts = [0, *self.ends.tolist()]
        both = (
            torch.cat([own + start for own, start in zip(positions, starts, strict=False)])
            for positions in (died, regrown)
        )
        self.record(*both)

    def _count_lifetimes(self, births: Tensor) -> None:
        """Add the ages of regrown connections that died: all are younger than the training."""
        if self.step + 2 > len(self.died_at):
            self.died_at = torch.cat([self.died_at, torch.zeros_like(self.died_at)])
        self.died_at.index_add_(0, self.step - births, self.one.expand(len(births)))
        # Those of the initial network are as old as the training, nowhere (-1) a step older.
        self.died_at[self.step : self.step + 2].zero_()

    def steps(self) -> pd.DataFrame:
        """One row a logged step and layer; those of step 0 are the initial network."""
        values = torch.stack(self.rows).cpu()  # rows x layers x (deaths, regrown, live, births)
        steps = torch.arange(len(self.rows), dtype=torch.int32) * self.every
        live, births = values[:, :, 2], values[:, :, 3]
        age = torch.where(live > 0, steps[:, None] - births / live.clamp(min=1), torch.nan)
        values = torch.cat([values[:, :, :3], age[:, :, None]], dim=2)
        table = pd.DataFrame(values.flatten(0, 1).numpy(), columns=list(STEP_COLUMNS[2:]))
        table = table.astype(dict.fromkeys(("deaths", "regrown", "live"), "int32"))
        table.insert(0, "layer", pd.Categorical(self.names * len(self.rows), self.names))
        table.insert(0, "step", steps.repeat_interleave(len(self.names)).numpy())
        return table

    def lifetimes(self) -> pd.DataFrame:
        """How many regrown connections died at each age, and how many of each age live now."""
        born = self.born.cpu()
        ages = (self.step - born[born > 0]).long()
        alive = torch.bincount(ages, minlength=len(self.died_at)).numpy()
        died = np.zeros_like(alive)
        died[: len(self.died_at)] = self.died_at.cpu()
        table = pd.DataFrame({"age": np.arange(len(alive)), "died": died, "alive": alive})
        return table[(table.died > 0) | (table.alive > 0)].reset_index(drop=True)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""
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
