"""Rewiring that holds no values of dormant connections. A step costs by the active connections.

All draws are those of `HostRewiring`: the same random numbers give the same connections and the
same values. One thing of a dormant connection can matter later: its velocity, if a regrown
connection keeps it. It is held until it is too small to change a regrown value.
"""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from robsparse.sparsity.compact_weight import CompactTheta
from robsparse.sparsity.rewiring import HostRewiring

DORMANT = "dormant"  # the key in the state of the optimiser


class CompactRewiring(HostRewiring):
    """Holds the values at the active positions of all layers in one tensor.

    `held` are these positions (int32), in increasing order, and `active` is int32 too. The theta
    and the positions of the layers are views of such tensors. The state of the optimiser has the
    velocities of theta and, under `DORMANT`, those of dormant connections with their positions.
    """

    def __init__(
        self,
        layers: list[tuple[Tensor, CompactTheta]],
        active: Tensor,
        budget: int,
        generator: torch.Generator,
        optimizer: torch.optim.Optimizer,
        *,
        smallest: float,
    ) -> None:
        """Join the values of the layers.

        Args:
            layers: The parameter and the parametrisation of each layer.
            active: As for `Rewiring`.
            budget: As for `Rewiring`.
            generator: As for `Rewiring`.
            optimizer: The optimiser of the parameters. It holds their "momentum_buffer".
            smallest: The velocity of a dormant connection is forgotten if it is not larger.

        Raises:
            ValueError: if positions do not fit into int32.
        """
        thetas, self.stores = [theta for theta, _ in layers], [store for _, store in layers]
        sizes = [store.shape.numel() for store in self.stores]
        if sum(sizes) > np.iinfo(np.int32).max:
            raise ValueError(f"expected at most {np.iinfo(np.int32).max} weights")
        self._describe(thetas, sizes, active.int(), budget, generator)
        self.pattern = self.groups = None
        self.optimizer, self.smallest = optimizer, smallest
        starts = self.starts[:-1].tolist()
        held = [store.positions + start for store, start in zip(self.stores, starts, strict=True)]
        self._hold(torch.cat(held).numpy(), torch.cat([theta.detach() for theta in thetas]).numpy())

    def _hold(self, held: np.ndarray, values: np.ndarray) -> None:
        """Make each layer a view of these values."""
        self.held, self.values = held, torch.from_numpy(values)
        starts = self.starts.numpy()
        self.lengths = np.diff(held.searchsorted(starts[1:]), prepend=0).tolist()
        positions = (held - starts[self._layers_of(held)]).astype(np.int32)
        parts = zip(self._split(values), self._split(positions), strict=True)
        for theta, layer, (part, places) in zip(self.layers, self.stores, parts, strict=True):
            theta.data, layer.positions = part, places
        self.addresses = [theta.data_ptr() for theta in self.layers]

    def _split(self, whole: np.ndarray) -> tuple[Tensor, ...]:
        """Return the part of each layer."""
        return torch.from_numpy(whole).split(self.lengths)

    def _layers_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the layer of each position."""
        return self.starts.numpy()[1:].searchsorted(positions, side="right")

    def move(self, noise: float, *, allow_drift: bool) -> Tensor:
        dormant = self._state().get(DORMANT)
        if dormant is not None:  # their velocities decay as those in the step of the optimiser
            dormant["momentum_buffer"].mul_(self.optimizer.param_groups[0]["momentum"])
        return super().move(noise, allow_drift=allow_drift)

    def forget_dormant(self) -> None:
        """Forget the velocities of dormant connections."""
        self._state().pop(DORMANT, None)

    def _state(self) -> dict[Any, dict[str, Any]]:
        """Return the state of the optimiser."""
        return cast(dict[Any, dict[str, Any]], self.optimizer.state)

    def _entries(self) -> Tensor:
        return torch.from_numpy(self.held.searchsorted(self.active.numpy()))

    def _replace(
        self, survives: Tensor, drifted: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        self.survivors = self.held[self.values.numpy() > 0]
        self.fresh = np.empty(0, np.int64)
        pruned, drawn = super()._replace(survives, drifted, value, by_room)
        self.active = self.active.int()
        if len(pruned) or len(drawn):
            self._renew(np.sort(self.fresh).astype(self.held.dtype), value)
        return pruned.long(), drawn.long()

    def _renew(self, fresh: np.ndarray, value: float) -> None:
        """Hold the survivors and the fresh positions, which get this value."""
        velocities = [self._state().get(theta, {}).get("momentum_buffer") for theta in self.layers]
        values, moving = self.values.numpy(), self._joined(velocities)
        alive = values > 0
        places = self.survivors.searchsorted(fresh)
        kept = self._exchange(self.held[~alive], moving[~alive], fresh)
        for theta in self.layers:
            theta.grad = None  # its length was that of the old theta
        self._hold(
            np.insert(self.survivors, places, fresh), np.insert(values[alive], places, value)
        )
        parts = self._split(np.insert(moving[alive], places, kept))
        for theta, old, new in zip(self.layers, velocities, parts, strict=True):
            if old is not None:
                self._state()[theta]["momentum_buffer"] = new

    def _exchange(self, pruned: np.ndarray, moving: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        """Hold the velocities of pruned positions, and return and forget those of fresh ones."""
        dormant = self._state().get(DORMANT)
        if dormant is not None:
            pruned = np.concatenate([dormant["positions"].numpy(), pruned])
            moving = np.concatenate([dormant["momentum_buffer"].numpy(), moving])
        matters = np.abs(moving) > self.smallest
        pruned, moving = pruned[matters], moving[matters]
        again = np.isin(pruned, fresh)
        found = np.zeros(len(fresh), moving.dtype)
        found[fresh.searchsorted(pruned[again])] = moving[again]
        self._state()[DORMANT] = {
            "positions": torch.from_numpy(pruned[~again]),
            "momentum_buffer": torch.from_numpy(moving[~again]),
        }
        return found

    def _joined(self, parts: list[Tensor | None]) -> np.ndarray:
        """Return one entry for each value: those of all parts, and 0 where a part is None."""
        pairs = zip(parts, self.layers, strict=True)
        filled = [torch.zeros_like(theta) if part is None else part for part, theta in pairs]
        return torch.cat([part.detach() for part in filled]).numpy()

    # ------------------------------------------------------------ what HostRewiring asks

    def _room(self) -> Tensor:
        counts = np.bincount(self._layers_of(self.survivors), minlength=len(self.layers))
        return self.sizes[:-1] - torch.from_numpy(counts)

    def _closed(self, candidates: Tensor) -> Tensor:
        tried = candidates.numpy()
        places = self.survivors.searchsorted(tried.astype(self.survivors.dtype))
        inside = np.minimum(places, len(self.survivors) - 1)
        closed = self.survivors[inside] == tried if len(self.survivors) else tried < 0
        return torch.from_numpy(closed | np.isin(tried, self.fresh))

    def _make_active(self, places: np.ndarray, value: float) -> None:
        self.fresh = np.concatenate([self.fresh, places[places < self.padding]])

    def _open(self, layer: int) -> Tensor:
        """Return, for each position of a layer, whether it is open (bool). It is a dense list."""
        start, size = int(self.starts[layer]), int(self.sizes[layer])
        is_open = torch.ones(size, dtype=torch.bool)
        for taken in (self.survivors, self.fresh):
            mine = taken[(taken >= start) & (taken < start + size)]
            is_open[torch.from_numpy(mine - start).long()] = False
        return is_open
