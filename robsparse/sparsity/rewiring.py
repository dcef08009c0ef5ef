"""The active connections of a whole network at once, and new places for those that become dormant.

For methods that rewire at every step: beyond a pass over the values, a step costs by the
connections that are active and change, not by the weights.

`rewiring_of` chooses between two classes with one interface. `HostRewiring` looks at how many
connections became dormant, which is free on a CPU. `DeviceRewiring` never makes the host wait for a
GPU; in return, some draws are made one step later.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# A draw tries so many positions of its layer in a round, and so many rounds at most, before the
# dormant ones are counted out. In a layer whose dormant share is a, all of them are active with
# probability (1 - a) ** 24: 1e-24 at a = 0.9, 5e-6 at 0.4.
CANDIDATES, ROUNDS = 8, 3


class Changes(NamedTuple):
    """Positions (int64) that changed in a step; `padding` of the rewiring may be among them.

    pruned: became dormant. drawn: became active by a draw. woken: became active without one.
    """

    pruned: Tensor
    woken: Tensor
    drawn: Tensor


class Rewiring(ABC):
    """The values of all layers in one tensor, the active positions, and draws of new ones.

    A position is an index into the weights of all layers, one layer after the other. A position
    whose value is above 0 is active, all others are dormant. The position after the last weight is
    `padding`: it stands for "no position" in lists of a fixed length.

    State that changes from step to step: `values` and `active` (positions, int64).
    """

    def __init__(
        self, layers: list[Tensor], active: Tensor, budget: int, generator: torch.Generator
    ) -> None:
        """Take over the layers' values: from here on each layer is a view of `values`.

        Args:
            layers: Of any shape, all on the device of the generator.
            active: Positions (int64) of the active connections, or `active` of an earlier rewiring.
            budget: How many connections are to be active.
            generator: Of noise and draws.
        """
        self.layers, self.budget, self.generator = layers, budget, generator
        sizes = [layer.numel() for layer in layers]
        self.padding = sum(sizes)
        self.values = torch.cat([*(x.detach().flatten() for x in layers), layers[0].new_zeros(1)])
        self.parts = self.values[:-1].split(sizes)
        for layer, part in zip(layers, self.parts, strict=True):
            layer.data = part.view_as(layer)
        self.addresses = [part.data_ptr() for part in self.parts]
        # Of each layer, and last of `padding`.
        self.sizes = torch.tensor([*sizes, 0], device=active.device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.active = active

    def is_intact(self) -> bool:
        """Whether the layers still are views of `values`: nothing has put other tensors there."""
        return [layer.data_ptr() for layer in self.layers] == self.addresses

    @abstractmethod
    def find_active(self) -> None:
        """List all positions above 0 as active, whatever was listed before."""

    def move(self, noise: float, *, may_wake: bool) -> Tensor:
        """Add noise * N(0, 1) to the active values; hold all others at 0 or below.

        With `may_wake` the others are left as they are, so that they can become active without
        being drawn. Returns which of `active` are above 0 still (bool).
        """
        values = self.values.index_select(0, self.active)
        if noise:
            device = values.device
            normal = torch.randn(len(values), generator=self.generator, device=device)
            values.add_(normal, alpha=noise)
        if not may_wake:
            self.values.clamp_(max=0)
        self.values.index_copy_(0, self.active, values)
        return values > 0

    def rewire(self, survives: Tensor, value: float, *, by_room: bool, may_wake: bool) -> Changes:
        """Replace the connections that became dormant, up to the budget.

        A layer is drawn for each with probability ~ size (`by_room`: ~ dormant positions), among
        the layers with room left, and a position uniformly among the dormant ones of the layer.

        Args:
            survives: What `move` returned.
            value: What a drawn position gets, above 0.
            by_room: Whether layers are drawn by their number of dormant positions.
            may_wake: As for `move`.
        """
        woken = self._woken() if may_wake else self.active[:0]
        pruned, drawn = self._replace(survives, woken, value, by_room)
        return Changes(pruned, woken, drawn)

    def reset(self, tensors: list[Tensor | None], positions: Tensor) -> None:
        """Set to 0 what the layers' own tensors (e.g. momentum) hold at these positions."""
        layer = torch.bucketize(positions, self.starts[1:], right=True)
        start = 0
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                # Positions of other layers multiply some element by 1: no list by layer is needed.
                own = (positions - start).clamp(0, tensor.numel() - 1)
                factor = (layer != i).to(tensor.dtype)
                tensor.view(-1).scatter_reduce_(0, own, factor, "prod")
            start += self.layers[i].numel()

    @abstractmethod
    def _woken(self) -> Tensor:
        """Positions above 0 that are not listed as active."""

    @abstractmethod
    def _replace(
        self, survives: Tensor, woken: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        """The positions that became dormant, and those drawn in their place; updates `active`."""

    def _unlisted(self) -> Tensor:
        """Which positions are above 0 without being listed as active (bool)."""
        above = self.values > 0
        above.index_fill_(0, self.active, False)
        return above[:-1]

    def _room(self) -> Tensor:
        """How many positions of each layer are dormant."""
        return torch.stack([(~(part > 0)).sum() for part in self.parts])

    def _uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), in double precision."""
        device = self.generator.device
        return torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)


class HostRewiring(Rewiring):
    """Replaces exactly the connections that became dormant, at once; `active` has no gaps.

    In NumPy: on the short lists of a step its calls take a fraction of PyTorch's time.
    """

    def find_active(self) -> None:
        self.active = (self.values[:-1] > 0).nonzero().squeeze(1)

    def _woken(self) -> Tensor:
        return self._unlisted().nonzero().squeeze(1)

    def _replace(
        self, survives: Tensor, woken: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        active, dead = self.active.numpy(), ~survives.numpy()
        slots = np.flatnonzero(dead)
        pruned = active[slots]
        missing = self.budget - (len(active) - len(pruned) + len(woken))
        chances = self._room() if by_room else self.sizes[:-1]
        drawn = self._draw(missing, value, chances.numpy()) if missing > 0 else pruned[:0]
        if len(drawn) == len(pruned):
            active[slots] = drawn
        else:
            self.active = torch.from_numpy(np.concatenate([active[~dead], drawn]))
        return torch.from_numpy(pruned), torch.from_numpy(drawn)

    def _draw(self, count: int, value: float, chances: np.ndarray) -> np.ndarray:
        """Make so many dormant positions active, in layers drawn with these chances."""
        edges = chances.cumsum()
        share = self._uniform(count).numpy()
        layer = edges.searchsorted(share * edges[-1], side="right")
        places = self._try(layer, value)
        for _ in range(ROUNDS - 1):
            left = np.flatnonzero(places == self.padding)
            if len(left) == 0:
                return places
            places[left] = self._try(layer[left], value)
        return self._count_out(places, layer, value, chances)

    def _try(self, layer: np.ndarray, value: float) -> np.ndarray:
        """A dormant position of each given layer, which becomes active, or `padding`.

        It is `padding` where all candidates are active or an earlier draw has taken the same one.
        Which draws win depends on nothing but their order, so that every set of dormant positions
        of a layer is as probable as any other of its size.
        """
        values, own = self.values.numpy(), layer[:, None]
        share = self._uniform(len(layer), CANDIDATES).numpy()
        offset = (share * self.sizes.numpy()[own]).astype(np.int64)
        tried = offset + self.starts.numpy()[own]
        taken = values[tried] > 0
        rows, first = np.arange(len(layer)), taken.argmin(axis=1)
        place = tried[rows, first]
        place[taken[rows, first]] = self.padding
        order = place.argsort(kind="stable")
        ordered = place[order]
        place[order[1:][ordered[1:] == ordered[:-1]]] = self.padding
        values[place] = value
        return place

    def _count_out(
        self, places: np.ndarray, layer: np.ndarray, value: float, chances: np.ndarray
    ) -> np.ndarray:
        """Choose the places that are still `padding` from lists of their layers' dormant positions,
        and those that a layer has no room for from other layers.
        """
        values, starts, chances = self.values.numpy(), self.starts.numpy(), chances.copy()
        left = np.flatnonzero(places == self.padding)
        for i in np.unique(layer[left]):
            own = left[layer[left] == i]
            dormant = starts[i] + np.flatnonzero(~(values[starts[i] : starts[i + 1]] > 0))
            order = torch.randperm(len(dormant), generator=self.generator).numpy()
            chosen = dormant[order[: len(own)]]
            places[own[: len(chosen)]] = chosen
            values[chosen] = value
            if len(own) >= len(dormant):
                chances[i] = 0
        left = np.flatnonzero(places == self.padding)
        if len(left):
            places[left] = self._draw(len(left), value, chances)
        return places


class DeviceRewiring(Rewiring):
    """Replaces connections without telling the host how many: all lists have a fixed length.

    They are filled up with `padding`, and a draw that finds no place is made again at the next
    step. This happens to draws beyond the dormant positions of a layer, to draws beyond `most` in a
    step, and, rarely, to draws that choose the same position in a nearly full layer (`ROUNDS`).
    """

    def __init__(
        self, layers: list[Tensor], active: Tensor, budget: int, generator: torch.Generator
    ) -> None:
        super().__init__(layers, active, budget, generator)
        if len(active) == 0 or active[-1] != self.padding:
            # The last slot stays `padding`: what is written there is lost.
            missing = max(0, budget - len(active))
            self.active = torch.cat([active, active.new_full((missing + 1,), self.padding)])
        self.most = min(len(self.active), max(1024, budget // 8))

    def find_active(self) -> None:
        found = self._where(self.values[:-1] > 0, self.padding)
        self.active = torch.cat([found, found.new_full((1,), self.padding)])

    def _woken(self) -> Tensor:
        return self._where(self._unlisted(), self.padding)

    def _where(self, mask: Tensor, fill: int, most: int | None = None) -> Tensor:
        """Indices of the first `most` (or all) true entries, filled up with `fill`."""
        most = len(mask) if most is None else most
        rank = mask.cumsum(0).masked_fill_(~mask, most + 1).clamp_(max=most + 1)
        found = torch.full((most + 1,), fill, device=mask.device)
        found.scatter_(0, rank - 1, torch.arange(len(mask), device=mask.device))
        return found[:most]

    def _replace(
        self, survives: Tensor, woken: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        pruned = self.active.masked_fill(survives, self.padding)
        empty = (~survives).logical_or_(self.active == self.padding)
        missing = self.budget - (~empty).sum() - (woken < self.padding).sum()
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
        """Make a dormant position active where one is wanted and a place is found for it."""
        edges = chances.double().cumsum(0)
        at = self._uniform(*wanted.shape) * edges[-1]
        nothing = len(self.parts)
        layer = torch.bucketize(at, edges, right=True).masked_fill_(~wanted, nothing)
        places = torch.full_like(layer, self.padding)
        for proposed in [self._anywhere] * ROUNDS + [self._counted_out]:
            left = layer.masked_fill(places < self.padding, nothing)
            places = torch.minimum(places, self._claim(proposed(left), value))
        return places

    def _counted_out(self, layer_N: Tensor) -> Tensor:
        """A dormant position of each given layer, found by its rank (N x 1)."""
        dormant = torch.zeros_like(self.values, dtype=torch.int64)
        torch.cumsum(~(self.values[:-1] > 0), 0, out=dormant[1:])  # before each position
        before = dormant[self.starts]
        room = (before[1:] - before[:-1])[layer_N.clamp(max=len(self.parts) - 1)]
        rank = before[layer_N] + (self._uniform(*layer_N.shape) * room).long()
        place = torch.bucketize(rank, dormant, right=True) - 1
        return place.masked_fill_((room == 0) | (layer_N == len(self.parts)), self.padding)[:, None]

    def _anywhere(self, layer_N: Tensor) -> Tensor:
        """Positions of each given layer, active or dormant (N x CANDIDATES)."""
        share = self._uniform(len(layer_N), CANDIDATES)
        offset = share.mul_(self.sizes.take(layer_N)[:, None]).long()
        return offset.add_(self.starts.take(layer_N)[:, None])

    def _claim(self, candidates: Tensor, value: float) -> Tensor:
        """Make the first dormant candidate of each row active; returns it, or `padding` where all
        candidates are active or an earlier row takes the same one: see `HostRewiring._try`.
        """
        taken = self.values.take(candidates) > 0
        first = taken.view(torch.uint8).argmin(1, keepdim=True)
        place = candidates.gather(1, first).squeeze(1)
        place.masked_fill_(taken.gather(1, first).squeeze(1), self.padding)
        ordered, order = place.sort(stable=True)
        again = ordered[1:] == ordered[:-1]
        place.scatter_(0, order[1:], ordered[1:].masked_fill(again, self.padding))
        self.values.index_fill_(0, place, value)
        return place


def rewiring_of(
    layers: list[Tensor], active: Tensor, budget: int, generator: torch.Generator
) -> Rewiring:
    """The rewiring for the device of the layers: on a GPU the host must not wait."""
    kind = HostRewiring if layers[0].device.type == "cpu" else DeviceRewiring
    return kind(layers, active, budget, generator)
