"""Rewiring of a whole network: each connection that becomes dormant is replaced by a new one.

It is made for methods that rewire at every step. A step makes one pass over all values. The rest of
its cost depends on the numbers of active and changed connections, not on the number of weights.

`make_rewiring` chooses between two classes with the same interface. `HostRewiring` reads how many
connections became dormant. On a CPU this costs nothing. `DeviceRewiring` never makes the CPU wait
for a GPU. In return, it makes some draws one step later.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robsparse.sparsity.patterns import Groups, open_positions

# A draw tries CANDIDATES positions of its layer in each of at most ROUNDS rounds. After that, it
# chooses from a list of the dormant positions. If a is the dormant share of the layer, all tried
# positions are active with probability (1 - a) ** 24: 1e-24 at a = 0.9, 5e-6 at a = 0.4.
CANDIDATES, ROUNDS = 8, 3


class Changes(NamedTuple):
    """Positions (int64) that changed in a step. They may include `padding` of the rewiring.

    pruned: became dormant. drifted: became active without a draw. drawn: became active by a draw.
    """

    pruned: Tensor
    drifted: Tensor
    drawn: Tensor


class Rewiring(ABC):
    """Holds the values of all layers in one tensor and the active positions, and draws new ones.

    A position is an index into the weights of all layers, one layer after the other. A position is
    active if its value is above 0, and dormant otherwise. The position after the last weight is
    `padding`: it means "no position" in lists of a fixed length.

    A dormant position is open if it can be drawn. Without a pattern, all of them are. With an N:M
    pattern, those are open whose group has fewer than N active positions
    (`robsparse.sparsity.patterns`). The connections of a step are drawn one after the other, each
    uniformly among the positions of its layer that are then open.

    A step changes `values` and `active` (positions, int64).
    """

    def __init__(
        self,
        layers: list[Tensor],
        active: Tensor,
        budget: int,
        generator: torch.Generator,
        pattern: str | None = None,
    ) -> None:
        """Copy the values of the layers, and make each layer a view of `values`.

        Args:
            layers: Tensors of any shape, all on the device of the generator.
            active: Positions (int64) of the active connections, or `active` of an earlier rewiring.
            budget: The number of connections that must be active.
            generator: Random numbers for noise and draws.
            pattern: "N:M", or None. Layers then have at least two dimensions.
        """
        sizes = [layer.numel() for layer in layers]
        self._describe(layers, sizes, active, budget, generator)
        self.pattern = pattern
        self.groups = None if pattern is None else Groups(layers, pattern)
        self.values = torch.cat([*(x.detach().flatten() for x in layers), layers[0].new_zeros(1)])
        self.parts = self.values[:-1].split(sizes)
        for layer, part in zip(layers, self.parts, strict=True):
            layer.data = part.view_as(layer)
        self.addresses = [part.data_ptr() for part in self.parts]

    def _describe(
        self,
        layers: list[Tensor],
        sizes: list[int],
        active: Tensor,
        budget: int,
        generator: torch.Generator,
    ) -> None:
        """Store the arguments of `__init__`. `sizes` are the numbers of weights of the layers."""
        self.layers, self.budget, self.generator = layers, budget, generator
        self.padding = sum(sizes)
        # Sizes and first positions of the layers and, as the last entry, of `padding`.
        self.sizes = torch.tensor([*sizes, 0], device=active.device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.active = active

    def is_intact(self) -> bool:
        """Return whether the layers are still views of `values`: other code may replace them."""
        return [layer.data_ptr() for layer in self.layers] == self.addresses

    @abstractmethod
    def find_active(self) -> None:
        """Set `active` to all positions with a value above 0."""

    def move(self, noise: float, *, allow_drift: bool) -> Tensor:
        """Add noise * N(0, 1) to the active values.

        Args:
            noise: Standard deviation of the noise.
            allow_drift: Whether a dormant connection can become active without a draw. If not, all
                dormant values above 0 are set to 0.

        Returns:
            For each entry of `active`, whether its value is still above 0 (bool).
        """
        entries = self._entries()
        values = self.values.index_select(0, entries)
        if noise:
            device = values.device
            normal = torch.randn(len(values), generator=self.generator, device=device)
            values.add_(normal, alpha=noise)
        if not allow_drift:
            self.values.clamp_(max=0)
        self.values.index_copy_(0, entries, values)
        return values > 0

    def _entries(self) -> Tensor:
        """Return the index into `values` of each entry of `active`."""
        return self.active

    def rewire(
        self, survives: Tensor, value: float, *, by_room: bool, allow_drift: bool
    ) -> Changes:
        """Replace the connections that became dormant, up to the budget.

        For each new connection, first a layer is drawn among the layers that have open positions.
        The probability of a layer is proportional to its size or, with `by_room`, to its number of
        open positions. Then an open position of this layer is drawn uniformly.

        Args:
            survives: The result of `move`.
            value: The value of a drawn position, above 0.
            by_room: Whether layers are drawn by their number of open positions.
            allow_drift: As for `move`.
        """
        drifted = self._drifted() if allow_drift else self.active[:0].long()
        pruned, drawn = self._replace(survives, drifted, value, by_room)
        return Changes(pruned, drifted, drawn)

    def reset(self, tensors: list[Tensor | None], positions: Tensor) -> None:
        """Set the entries at these positions to 0 in one tensor for each layer (e.g. momentum)."""
        layer = torch.bucketize(positions, self.starts[1:], right=True)
        start = 0
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                # Positions of other layers multiply an arbitrary element by 1. So no separate list
                # for each layer is needed.
                index = (positions - start).clamp(0, tensor.numel() - 1)
                factor = (layer != i).to(tensor.dtype)
                tensor.view(-1).scatter_reduce_(0, index, factor, "prod")
            start += self.layers[i].numel()

    @abstractmethod
    def _drifted(self) -> Tensor:
        """Return the positions above 0 that are not in `active`."""

    @abstractmethod
    def _replace(
        self, survives: Tensor, drifted: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        """Update `active`. Return the pruned positions and the drawn positions."""

    def _unlisted(self) -> Tensor:
        """Return, for each position, whether it is above 0 and not in `active` (bool)."""
        above = self.values > 0
        above.index_fill_(0, self.active, False)
        return above[:-1]

    def _open(self, layer: int) -> Tensor:
        """Return, for each position of a layer, whether it is open (bool)."""
        active = self.parts[layer].view_as(self.layers[layer]) > 0
        return open_positions(active, self.pattern).flatten()

    def _room(self) -> Tensor:
        """Return the number of open positions of each layer."""
        return torch.stack([self._open(layer).sum() for layer in range(len(self.parts))])

    def _closed(self, candidates: Tensor) -> Tensor:
        """Return, for each candidate, whether it is not open (bool)."""
        active = self.values.take(candidates) > 0
        if self.groups is None:
            return active
        return active.logical_or_(self.groups.room(self.values, candidates) <= 0)

    def _fitting(self, places: Tensor) -> Tensor:
        """Return different open places. If a group has too little room, its last are `padding`."""
        return places if self.groups is None else self.groups.fitting(self.values, places)

    def _uniform(self, *shape: int) -> Tensor:
        """Return uniform random numbers in [0, 1), in double precision."""
        device = self.generator.device
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)


class HostRewiring(Rewiring):
    """Replaces all connections that became dormant in the same step. `active` has no padding.

    It uses NumPy, because NumPy is several times faster than PyTorch on the short lists of a step.
    """

    def find_active(self) -> None:
        self.active = (self.values[:-1] > 0).nonzero().squeeze(1)

    def _drifted(self) -> Tensor:
        return self._unlisted().nonzero().squeeze(1)

    def _replace(
        self, survives: Tensor, drifted: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        active, dormant = self.active.numpy(), ~survives.numpy()
        slots = np.flatnonzero(dormant)
        pruned = active[slots]
        missing = self.budget - (len(active) - len(pruned) + len(drifted))
        chances = self._room() if by_room else self.sizes[:-1]
        drawn = self._draw(missing, value, chances.numpy()) if missing > 0 else pruned[:0]
        if len(drawn) == len(pruned):
            active[slots] = drawn
        else:
            self.active = torch.from_numpy(np.concatenate([active[~dormant], drawn]))
        return torch.from_numpy(pruned), torch.from_numpy(drawn)

    def _draw(self, count: int, value: float, chances: np.ndarray) -> np.ndarray:
        """Make `count` open positions active, in layers drawn in proportion to `chances`."""
        edges = chances.cumsum()
        share = self._uniform(count).numpy()
        layer = edges.searchsorted(share * edges[-1], side="right")
        places = self._try(layer, value)
        for _ in range(ROUNDS - 1):
            left = np.flatnonzero(places == self.padding)
            if len(left) == 0:
                return places
            places[left] = self._try(layer[left], value)
        return self._choose_from_lists(places, layer, value, chances)

    def _try(self, layer: np.ndarray, value: float) -> np.ndarray:
        """Make one open position of each given layer active. Return these positions.

        The result is `padding` where no candidate is open, or where earlier draws chose the same
        position or filled its group. If several draws choose a position, the first draw gets it.
        Therefore, all sets of dormant positions of a layer with the same size have the same
        probability, if there is no pattern.
        """
        layers = layer[:, None]
        share = self._uniform(len(layer), CANDIDATES).numpy()
        offset = (share * self.sizes.numpy()[layers]).astype(np.int64)
        tried = offset + self.starts.numpy()[layers]
        closed = self._closed(torch.from_numpy(tried)).numpy()
        rows, first = np.arange(len(layer)), closed.argmin(axis=1)
        place = tried[rows, first]
        place[closed[rows, first]] = self.padding
        order = place.argsort(kind="stable")
        ordered = place[order]
        place[order[1:][ordered[1:] == ordered[:-1]]] = self.padding
        place = self._fitting(torch.from_numpy(place)).numpy()
        self._make_active(place, value)
        return place

    def _make_active(self, places: np.ndarray, value: float) -> None:
        """Set the values at these positions. They may include `padding`."""
        self.values.numpy()[places] = value

    def _choose_from_lists(
        self, places: np.ndarray, layer: np.ndarray, value: float, chances: np.ndarray
    ) -> np.ndarray:
        """Replace each remaining `padding` by a position from a list of its layer's open ones.

        If a layer has too few open positions, the rest is drawn in other layers.
        """
        chances = chances.copy()
        left = np.flatnonzero(places == self.padding)
        for i in np.unique(layer[left]):
            mine = left[layer[left] == i]
            found = self._open(i).nonzero().squeeze(1) + self.starts[i]
            found = self._fitting(found[torch.randperm(len(found), generator=self.generator)])
            found = found[found < self.padding]
            chosen = found[: len(mine)].numpy()
            places[mine[: len(chosen)]] = chosen
            self._make_active(chosen, value)
            if len(mine) >= len(found):
                chances[i] = 0
        left = np.flatnonzero(places == self.padding)
        if len(left):
            places[left] = self._draw(len(left), value, chances)
        return places


class DeviceRewiring(Rewiring):
    """Replaces connections on a GPU. All lists have a fixed length, so the CPU never waits.

    Unused entries of a list are `padding`. A draw that finds no position is repeated in the next
    step. This happens in three cases: a layer gets more draws than it has open positions; a step
    has more than `most` draws; or, rarely, two draws choose the same position or fill a group in a
    layer with few open positions (`ROUNDS`).
    """

    def __init__(
        self,
        layers: list[Tensor],
        active: Tensor,
        budget: int,
        generator: torch.Generator,
        pattern: str | None = None,
    ) -> None:
        super().__init__(layers, active, budget, generator, pattern)
        if len(active) == 0 or active[-1] != self.padding:
            # The last slot is always `padding`. Values that are written there are ignored.
            missing = max(0, budget - len(active))
            self.active = torch.cat([active, active.new_full((missing + 1,), self.padding)])
        self.most = min(len(self.active), max(1024, budget // 8))

    def find_active(self) -> None:
        found = self._where(self.values[:-1] > 0, self.padding)
        self.active = torch.cat([found, found.new_full((1,), self.padding)])

    def _drifted(self) -> Tensor:
        return self._where(self._unlisted(), self.padding)

    def _where(self, mask: Tensor, fill: int, most: int | None = None) -> Tensor:
        """Return the indices of the first `most` true entries, or all; the rest is `fill`."""
        most = len(mask) if most is None else most
        rank = mask.cumsum(0).masked_fill_(~mask, most + 1).clamp_(max=most + 1)
        found = torch.full((most + 1,), fill, device=mask.device)
        found.scatter_(0, rank - 1, torch.arange(len(mask), device=mask.device))
        return found[:most]

    def _replace(
        self, survives: Tensor, drifted: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        pruned = self.active.masked_fill(survives, self.padding)
        empty = (~survives).logical_or_(self.active == self.padding)
        missing = self.budget - (~empty).sum() - (drifted < self.padding).sum()
        chosen = empty & (empty.cumsum(0) <= missing)
        chosen[-1:].fill_(False)
        last = len(empty) - 1
        slots = self._where(chosen, last, self.most)
        room = self._room()
        chances = room if by_room else self.sizes[:-1] * (room > 0)
        drawn = self._draw(slots < last, value, chances)
        self.active = self.active.masked_fill(empty, self.padding).index_copy_(0, slots, drawn)
        return pruned, drawn

    def _draw(self, wanted: Tensor, value: float, chances: Tensor) -> Tensor:
        """Make one open position active for each true entry of `wanted`, where one is found."""
        edges = chances.double().cumsum(0)
        at = self._uniform(*wanted.shape) * edges[-1]
        no_layer = len(self.parts)
        layer = torch.bucketize(at, edges, right=True).masked_fill_(~wanted, no_layer)
        places = torch.full_like(layer, self.padding)
        for propose in [self._random_positions] * ROUNDS + [self._open_positions]:
            left = layer.masked_fill(places < self.padding, no_layer)
            places = torch.minimum(places, self._activate(propose(left), value))
        return places

    def _open_positions(self, layer_N: Tensor) -> Tensor:
        """Return one open position of each given layer, found by its rank (N x 1)."""
        all_open = torch.cat([self._open(layer) for layer in range(len(self.parts))])
        up_to = torch.zeros_like(self.values, dtype=torch.int64)
        torch.cumsum(all_open, 0, out=up_to[1:])  # open positions before each position
        before = up_to[self.starts]
        room = (before[1:] - before[:-1])[layer_N.clamp(max=len(self.parts) - 1)]
        rank = before[layer_N] + (self._uniform(*layer_N.shape) * room).long()
        place = torch.bucketize(rank, up_to, right=True) - 1
        return place.masked_fill_((room == 0) | (layer_N == len(self.parts)), self.padding)[:, None]

    def _random_positions(self, layer_N: Tensor) -> Tensor:
        """Return random positions of each given layer, active or dormant (N x CANDIDATES)."""
        share = self._uniform(len(layer_N), CANDIDATES)
        offset = share.mul_(self.sizes.take(layer_N)[:, None]).long()
        return offset.add_(self.starts.take(layer_N)[:, None])

    def _activate(self, candidates: Tensor, value: float) -> Tensor:
        """Make the first open candidate of each row active. Return these positions.

        The result is `padding` where no candidate is open, or where earlier rows chose the same
        position or filled its group (as in `HostRewiring._try`).
        """
        closed = self._closed(candidates)
        first = closed.view(torch.uint8).argmin(1, keepdim=True)
        place = candidates.gather(1, first).squeeze(1)
        place.masked_fill_(closed.gather(1, first).squeeze(1), self.padding)
        ordered, order = place.sort(stable=True)
        again = ordered[1:] == ordered[:-1]
        place.scatter_(0, order[1:], ordered[1:].masked_fill(again, self.padding))
        place = self._fitting(place)
        self.values.index_fill_(0, place, value)
        return place


def make_rewiring(
    layers: list[Tensor],
    active: Tensor,
    budget: int,
    generator: torch.Generator,
    pattern: str | None = None,
) -> Rewiring:
    """Return the rewiring for the device of the layers. The CPU must not wait for a GPU."""
    kind = HostRewiring if layers[0].device.type == "cpu" else DeviceRewiring
    return kind(layers, active, budget, generator, pattern)
