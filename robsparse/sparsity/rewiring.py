"""The live connections of a whole network at once, and new places for those that die.

For methods that rewire at every step: beyond a pass over the values, a step costs by the
connections that live and change, not by the weights.
"""

import numpy as np
import torch
from torch import Tensor

# A draw tries so many positions of its layer in a round, and so many rounds at most, before the
# dormant ones are counted out. One whose layer has a dormant share a gets there with probability
# (1 - a) ** 24: 1e-24 at a = 0.9, 5e-6 at 0.4.
CANDIDATES, ROUNDS = 8, 3


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


class Wiring:
    """The values of all layers in one tensor, the positions that live, and draws of new ones.

    A position counts through the layers' weights, one layer after the other; one whose value is
    above 0 lives, all others are dormant. Position `nowhere`, after the last, is of no layer.

    A step is rewired in one of two ways. The exact one looks at how many connections died, which
    is free on a CPU. The blind one never makes the host wait for a GPU: its lists have a fixed
    length, filled up with `nowhere`, and a draw that finds no place is made again at the next
    step. That happens to draws beyond a layer's room, to those beyond `most` in a step, and with
    the probability above to those that meet another one in a nearly full layer.
    """

    def __init__(
        self,
        layers: list[Tensor],
        live: Tensor,
        budget: int,
        generator: torch.Generator,
        *,
        exact: bool,
    ) -> None:
        """Take over the layers' values: from here on each layer is a view of `values`.

        live: positions (int64) of the live connections, or the `live` of an earlier wiring.
        """
        self.layers, self.budget, self.generator, self.exact = layers, budget, generator, exact
        sizes = [layer.numel() for layer in layers]
        self.nowhere = sum(sizes)
        self.values = torch.cat([*(x.detach().flatten() for x in layers), layers[0].new_zeros(1)])
        self.parts = self.values[:-1].split(sizes)
        for layer, part in zip(layers, self.parts, strict=True):
            layer.data = part.view_as(layer)
        self.addresses = [part.data_ptr() for part in self.parts]
        # Of each layer, and last of nowhere.
        self.sizes = torch.tensor([*sizes, 0], device=live.device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.ends = self.starts[1:]
        if not exact and (len(live) == 0 or live[-1] != self.nowhere):
            # The last slot stays empty: it stands for none.
            missing = max(0, budget - len(live))
            live = torch.cat([live, live.new_full((missing + 1,), self.nowhere)])
        self.live = live
        self.most = min(len(live), max(1024, budget // 8))

    def is_intact(self) -> bool:
        """Whether the layers still are views of `values`: nothing has put other tensors there."""
        return [layer.data_ptr() for layer in self.layers] == self.addresses

    def find_live(self) -> None:
        """List all positions above 0 as live, whatever was listed before."""
        self.live = self._where(self.values[:-1] > 0, self.nowhere)
        if not self.exact:
            self.live = torch.cat([self.live, self.live.new_full((1,), self.nowhere)])

    def move(self, noise: float, *, may_wake: bool) -> Tensor:
        """Add noise * N(0, 1) to the live values; hold the others at 0 or below unless they may
        wake up by themselves. Returns which of `live` are above 0 still.
        """
        values = self.values.index_select(0, self.live)
        if noise:
            device = values.device
            normal = torch.randn(len(values), generator=self.generator, device=device)
            values.add_(normal, alpha=noise)
        if not may_wake:
            self.values.clamp_(max=0)
        self.values.index_copy_(0, self.live, values)
        return values > 0

    def rewire(
        self, lives: Tensor, value: float, *, by_room: bool, may_wake: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace the connections that died, up to the budget: what `move` returned says which.

        A layer is drawn for each with probability ~ size (`by_room`: ~ dormant positions), among
        those with room left, and a position uniformly among the dormant ones of the layer. They
        get `value`. Returns the positions that died, that woke up by themselves, that were drawn.
        """
        woken = self._woken() if may_wake else self.live[:0]
        rewire = self._rewire_exactly if self.exact else self._rewire_blindly
        died, drawn = rewire(lives, woken, value, by_room)
        return died, woken, drawn

    def reset(self, tensors: list[Tensor | None], positions: Tensor) -> None:
        """Set to 0 what the layers' own tensors hold at these positions."""
        layer = torch.bucketize(positions, self.ends, right=True)
        start = 0
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                # Positions of other layers multiply some element by 1: no list by layer is needed.
                own = (positions - start).clamp(0, tensor.numel() - 1)
                factor = (layer != i).to(tensor.dtype)
                tensor.view(-1).scatter_reduce_(0, own, factor, "prod")
            start += self.layers[i].numel()

    def _room(self) -> Tensor:
        """How many positions of each layer are dormant."""
        return torch.stack([(~(part > 0)).sum() for part in self.parts])

    def _woken(self) -> Tensor:
        """Positions that live without being listed."""
        alive = self.values > 0
        alive.index_fill_(0, self.live, False)
        return self._where(alive[:-1], self.nowhere)

    def _where(self, mask: Tensor, none: int, most: int | None = None) -> Tensor:
        """Indices where the mask is true; blindly the first `most` (or all), then `none`."""
        if self.exact:
            return mask.nonzero().squeeze(1)
        most = len(mask) if most is None else most
        rank = mask.cumsum(0).masked_fill_(~mask, most + 1).clamp_(max=most + 1)
        found = torch.full((most + 1,), none, device=mask.device)
        found.scatter_(0, rank - 1, torch.arange(len(mask), device=mask.device))
        return found[:most]

    # ---------------------------------------------------------------- the exact way

    # In NumPy: on the short lists of a step its calls take a fraction of PyTorch's time.

    def _rewire_exactly(
        self, lives: Tensor, woken: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        live, dead = self.live.numpy(), ~lives.numpy()
        slots = np.flatnonzero(dead)
        died = live[slots]
        missing = self.budget - (len(live) - len(died) + len(woken))
        chances = self._room() if by_room else self.sizes[:-1]
        drawn = self._draw(missing, value, chances.numpy()) if missing > 0 else died[:0]
        if len(drawn) == len(died):
            live[slots] = drawn
        else:
            self.live = torch.from_numpy(np.concatenate([live[~dead], drawn]))
        return torch.from_numpy(died), torch.from_numpy(drawn)

    def _draw(self, count: int, value: float, chances: np.ndarray) -> np.ndarray:
        """Bring so many dormant positions to life, in layers drawn with these chances."""
        edges = chances.cumsum()
        share = _uniform((count,), self.generator).numpy()
        layer = edges.searchsorted(share * edges[-1], side="right")
        places = self._try(layer, value)
        for _ in range(ROUNDS - 1):
            left = np.flatnonzero(places == self.nowhere)
            if len(left) == 0:
                return places
            places[left] = self._try(layer[left], value)
        return self._count_out(places, layer, value, chances)

    def _try(self, layer: np.ndarray, value: float) -> np.ndarray:
        """A dormant position of each given layer, or nowhere: see `_claim`."""
        values, own = self.values.numpy(), layer[:, None]
        share = _uniform((len(layer), CANDIDATES), self.generator).numpy()
        offset = (share * self.sizes.numpy()[own]).astype(np.int64)
        tried = offset + self.starts.numpy()[own]
        lives = values[tried] > 0
        rows, first = np.arange(len(layer)), lives.argmin(axis=1)
        place = tried[rows, first]
        place[lives[rows, first]] = self.nowhere
        order = place.argsort(kind="stable")
        ordered = place[order]
        place[order[1:][ordered[1:] == ordered[:-1]]] = self.nowhere
        values[place] = value
        return place

    def _count_out(
        self, places: np.ndarray, layer: np.ndarray, value: float, chances: np.ndarray
    ) -> np.ndarray:
        """Find the places that are still nowhere in lists of their layers' dormant positions, and
        those that a layer has no room for in other layers.
        """
        values, starts, chances = self.values.numpy(), self.starts.numpy(), chances.copy()
        left = np.flatnonzero(places == self.nowhere)
        for i in np.unique(layer[left]):
            own = left[layer[left] == i]
            dormant = starts[i] + np.flatnonzero(~(values[starts[i] : starts[i + 1]] > 0))
            order = torch.randperm(len(dormant), generator=self.generator).numpy()
            chosen = dormant[order[: len(own)]]
            places[own[: len(chosen)]] = chosen
            values[chosen] = value
            if len(own) >= len(dormant):
                chances[i] = 0
        left = np.flatnonzero(places == self.nowhere)
        if len(left):
            places[left] = self._draw(len(left), value, chances)
        return places

    # ---------------------------------------------------------------- the blind way

    def _rewire_blindly(
        self, lives: Tensor, woken: Tensor, value: float, by_room: bool
    ) -> tuple[Tensor, Tensor]:
        died = self.live.masked_fill(lives, self.nowhere)
        empty = (~lives).logical_or_(self.live == self.nowhere)
        missing = self.budget - (~empty).sum() - (woken < self.nowhere).sum()
        chosen = empty & (empty.cumsum(0) <= missing)
        chosen[-1:].fill_(False)
        none = len(empty) - 1
        slots = self._where(chosen, none, self.most)
        room = self._room()
        chances = room if by_room else self.sizes[:-1] * (room > 0)
        drawn = self._draw_blindly(slots < none, value, chances)
        self.live = self.live.masked_fill(empty, self.nowhere).index_copy_(0, slots, drawn)
        return died, drawn

    def _draw_blindly(self, wanted: Tensor, value: float, chances: Tensor) -> Tensor:
        """Bring a dormant position to life where one is wanted and a place is found for it."""
        edges = chances.double().cumsum(0)
        at = _uniform(wanted.shape, self.generator) * edges[-1]
        nothing = len(self.parts)
        layer = torch.bucketize(at, edges, right=True).masked_fill_(~wanted, nothing)
        places = torch.full_like(layer, self.nowhere)
        for proposed in [self._anywhere] * ROUNDS + [self._counted_out]:
            left = layer.masked_fill(places < self.nowhere, nothing)
            places = torch.minimum(places, self._claim(proposed(left), value))
        return places

    def _counted_out(self, layer_N: Tensor) -> Tensor:
        """A dormant position of each given layer, found by its rank (N x 1)."""
        dormant = torch.zeros_like(self.values, dtype=torch.int64)
        torch.cumsum(~(self.values[:-1] > 0), 0, out=dormant[1:])  # before each position
        before = dormant[self.starts]
        room = (before[1:] - before[:-1])[layer_N.clamp(max=len(self.parts) - 1)]
        rank = before[layer_N] + (_uniform(layer_N.shape, self.generator) * room).long()
        place = torch.bucketize(rank, dormant, right=True) - 1
        return place.masked_fill_((room == 0) | (layer_N == len(self.parts)), self.nowhere)[:, None]

    def _anywhere(self, layer_N: Tensor) -> Tensor:
        """Positions of each given layer, live or dormant (N x CANDIDATES)."""
        share = _uniform((len(layer_N), CANDIDATES), self.generator)
        offset = share.mul_(self.sizes.take(layer_N)[:, None]).long()
        return offset.add_(self.starts.take(layer_N)[:, None])

    def _claim(self, candidates: Tensor, value: float) -> Tensor:
        """Bring to life the first dormant candidate of each row; returns it, or nowhere where all
        candidates live or an earlier row takes the same one.

        Which positions win depends on nothing but who drew them, so that every set of dormant
        positions of a layer is as probable as any other of its size.
        """
        lives = self.values.take(candidates) > 0
        first = lives.view(torch.uint8).argmin(1, keepdim=True)
        place = candidates.gather(1, first).squeeze(1)
        place.masked_fill_(lives.gather(1, first).squeeze(1), self.nowhere)
        ordered, order = place.sort(stable=True)
        again = ordered[1:] == ordered[:-1]
        place.scatter_(0, order[1:], ordered[1:].masked_fill(again, self.nowhere))
        self.values.index_fill_(0, place, value)
        return place
