"""N:M patterns: of each group of M weights, at most N are nonzero (fine-grained sparsity).

A group is M weights of one output channel and one kernel tap, at input channels 0 to M - 1, M to
2 M - 1, and so on. In a linear layer, taps do not exist. This is the order in which sparse tensor
cores need 2:4: they read the reduction dimension of a matrix product. In a convolution with
channels-last images this dimension has the taps outside and the input channels inside, because
neighbouring channels are neighbours in memory. The layout of a PyTorch weight (output channel,
input channel, tap) has other neighbours: groups of it would give no speed.

If M does not divide the input channels, the last group of each tap has fewer weights, and at most N
of them are nonzero. Hardware fills such a group with zeros. A layer with at most N input channels
has no constraint.

A pattern is a string "N:M" (`robsparse.schema.fields.Pattern`).

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (2:4 of magnitudes). Groups
as in NVIDIA's library ASP (apex/contrib/sparsity), which also fills rows with zeros. ASP leaves
layers dense that are too small for tensor cores; here every layer has the pattern.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from robsparse.schema.fields import pattern_numbers


def capacity(shape: torch.Size, pattern: str | None) -> int:
    """Return how many weights of a layer of this shape may be nonzero. Without a pattern: all."""
    if pattern is None:
        return shape.numel()
    most, size = pattern_numbers(pattern)
    whole, rest = divmod(shape[1], size)
    return shape.numel() // shape[1] * (whole * most + min(rest, most))


def largest_of_groups(score: Tensor, pattern: str) -> Tensor:
    """Return a mask (bool) of the N largest entries of each group. Of equal ones, the first."""
    most, size = pattern_numbers(pattern)
    groups = _groups(score, size, -torch.inf)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :most], True)
    return _layer(mask, score.shape[1])


def open_positions(active: Tensor, pattern: str | None) -> Tensor:
    """Return which dormant positions may become active (bool): those of groups with room.

    Args:
        active: Whether each weight of a layer is active (bool, the weight's shape).
        pattern: "N:M", or None if all dormant positions may.
    """
    if pattern is None:
        return ~active
    most, size = pattern_numbers(pattern)
    groups = _groups(active, size, False)
    room = groups.sum(-1, keepdim=True) < most
    return _layer(~groups & room, active.shape[1])


def _groups(layer: Tensor, size: int, fill: float) -> Tensor:
    """Return the entries of a layer by groups (output channel x taps x group x size)."""
    last = layer.movedim(1, -1)
    return F.pad(last, (0, -last.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def _layer(groups: Tensor, channels: int) -> Tensor:
    """Return the entries of groups in the layout of the layer, without the filled entries."""
    return groups.flatten(-2)[..., :channels].movedim(-1, 1)


class Groups:
    """The groups of many layers, for single positions. It reads the values anew at every call.

    A position is an index into the weights of all layers, one layer after the other. The position
    after the last weight is `padding`: it means "no position". On a GPU, the CPU never waits.
    """

    def __init__(self, layers: list[Tensor], pattern: str) -> None:
        """Read the shapes of the layers (output x input channels x any taps)."""
        self.most, self.size = pattern_numbers(pattern)
        device, sizes = layers[0].device, [layer.numel() for layer in layers]
        self.padding = sum(sizes)
        self.ends = torch.tensor(sizes, device=device).cumsum(0)
        self.starts = F.pad(self.ends, (1, 0))
        # The last entry of both is that of `padding`.
        self.channels = torch.tensor([*(x.shape[1] for x in layers), 1], device=device)
        self.taps = torch.tensor([*(x[0, 0].numel() for x in layers), 1], device=device)
        self.steps = torch.arange(self.size, device=device)

    def members(self, positions: Tensor) -> Tensor:
        """Return the positions of the group of each position, in a new last dimension.

        If a group has fewer than M positions, the rest is `padding`.
        """
        layer = torch.bucketize(positions, self.ends, right=True)
        taps, channels = self.taps[layer], self.channels[layer]
        channel = (positions - self.starts[layer]) // taps % channels
        inner = channel % self.size
        found = (positions - inner * taps)[..., None] + self.steps * taps[..., None]
        inside = (channel - inner)[..., None] + self.steps < channels[..., None]
        return found.masked_fill_(~inside, self.padding)

    def room(self, values: Tensor, positions: Tensor) -> Tensor:
        """Return how many positions may become active in the group of each position.

        Args:
            values: The values of all positions and of `padding`. Values above 0 are active.
            positions: Positions (int64, any shape).
        """
        members = self.members(positions)
        active = (values.take(members) > 0) & (members < self.padding)
        return self.most - active.sum(-1)

    def fitting(self, values: Tensor, positions: Tensor) -> Tensor:
        """Return the positions; those for which their group has no room become `padding`.

        Room is given in the order of the list.

        Args:
            values: As for `room`. All positions are still dormant.
            positions: Different positions (int64, one dimension), or `padding`.
        """
        first, order = self.members(positions)[:, 0].sort(stable=True)
        place = torch.arange(len(order), device=order.device)
        begins = F.pad(first[1:] != first[:-1], (1, 0), value=True)
        rank = place - place.where(begins, 0).cummax(0).values
        sorted_positions = positions[order]
        full = rank >= self.room(values, sorted_positions)
        return positions.scatter(0, order, sorted_positions.masked_fill(full, self.padding))
