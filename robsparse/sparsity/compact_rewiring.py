"""Rewiring that holds no values of dormant connections. A step costs by the active connections.

All draws are those of `HostRewiring`: the same random numbers give the same connections and the
same values. One thing of a dormant connection can matter later: its velocity, if a regrown
connection keeps it. It is held until it is too small to change a regrown value.
"""

import numpy as np
import torch
from torch import Tensor

from robsparse.sparsity.compact_weight import CompactTheta
from robsparse.sparsity.rewiring import HostRewiring


class CompactRewiring(HostRewiring):
    """Holds the values of all layers at the positions of their `CompactTheta`, in one tensor.

    A dormant value that is still held is not above 0. `held` are the increasing positions (int32)
    of `values`, and `active` is int32 too. The theta, the positions and the velocities of the
    layers are views of such tensors.
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

    def forget_dormant(self) -> None:
        """Hold the active connections only."""
        self._renew(np.empty(0, np.int32), np.inf)

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
            self._renew(self.fresh, self.smallest)
            self.values[self.held.searchsorted(self.fresh)] = value
        return pruned.long(), drawn.long()

    def _renew(self, fresh: np.ndarray, smallest: float) -> None:
        """Hold fresh positions too, and none whose velocity does not matter."""
        states = [self.optimizer.state.get(theta, {}) for theta in self.layers]
        velocities = [state.get("momentum_buffer") for state in states]
        gradients = [theta.grad for theta in self.layers]
        values, moving = self.values.numpy(), self._joined(velocities)
        kept = (values > 0) | (np.abs(moving) > smallest)
        held = self.held[kept]
        fresh = np.setdiff1d(fresh, held).astype(held.dtype)
        places = held.searchsorted(fresh)
        values, moving, slopes = (
            np.insert(array[kept], places, 0) for array in (values, moving, self._joined(gradients))
        )
        for theta in self.layers:
            theta.grad = None  # torch does not allow a gradient of another length
        self._hold(np.insert(held, places, fresh), values)
        for state, old, new in zip(states, velocities, self._split(moving), strict=True):
            if old is not None:
                state["momentum_buffer"] = new
        for theta, old, new in zip(self.layers, gradients, self._split(slopes), strict=True):
            theta.grad = None if old is None else new

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
