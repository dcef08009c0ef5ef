"""Folded layers: weights of one moment, batch norm folded in, laid out for the device.

A *source* is a layer of the network with the batch norm and the ReLU after it. A *folded layer* is
what it computes with the weights of one moment, and a *snapshot* holds the folded layers of a
network. A source stays the same as long as the structure of the network does; a folded layer never
changes, and keeps nothing but values that it would compute again from its own weights.

Which layout convolutions want, and where a CPU is faster with matrices (`small_maps`), was measured
(docs/speed.md); it follows from shapes and weights alone, so that the same run gives the same bits
again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.fast import proof
from robsparse.fast.small_maps import NARROW, PIXELS, Matrix, SmallMap, form_of
from robsparse.models._layers import TensorFlowConv2d

# Weights of a convolution from which a CPU is faster at fp32 with channels first.
MANY_WEIGHTS = 2**20


@dataclass(frozen=True, eq=False)
class Affine:
    """Weight and bias of a folded layer, both its own.

    density: share of nonzero weights, counted for convolutions on a CPU alone; else 1.
    """

    weight: Tensor
    bias: Tensor | None
    density: float = 1.0

    def to(self, dtype: torch.dtype | None) -> "Affine":
        """The same in another precision, if one is given and this is fp32."""
        if dtype is None or self.weight.dtype != torch.float32:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return Affine(self.weight.to(dtype), bias, self.density)

    def tensors(self) -> list[Tensor]:
        """Weight and, if there is one, bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def clone(self) -> "Affine":
        """A copy in memory of its own."""
        bias = None if self.bias is None else self.bias.clone()
        return Affine(self.weight.clone(), bias, self.density)


# ---------------------------------------------------------------- folded layers


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """Batch norm that no layer takes up: x * weight + bias, one of each a channel."""

    affine: Affine

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.affine.weight, self.affine.bias
        assert bias is not None
        return torch.addcmul(bias, x.to(weight.dtype), weight)


@dataclass(frozen=True, eq=False)
class FoldedLinear:
    """A linear layer, then a ReLU if `rectified`."""

    affine: Affine
    rectified: bool

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.affine.weight, self.affine.bias
        out = F.linear(x.to(weight.dtype), weight, bias)
        return out.relu_() if self.rectified else out


@dataclass(frozen=True, eq=False)
class FoldedConvolution:
    """A convolution, then a ReLU if there was one; on a CPU by its matrix where that is faster.

    affine: in the precision that it computes in. full: in the network's own precision, which
    matrices are formed from; None on a GPU. columns: whether small maps keep images innermost in
    memory, as sparse matrices want it (`small_maps`).
    """

    source: "ConvolutionSource"
    affine: Affine
    full: Affine | None
    columns: bool
    # Formed from the weights above when they are first needed.
    _matrices: dict[tuple[torch.Size, str], Matrix] = field(default_factory=dict, init=False)
    _channels_first: list[Tensor] = field(default_factory=list, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        source, rectified = self.source, self.source.rectified
        if self.full is not None:
            bf16 = self.affine.weight.dtype == torch.bfloat16
            form = form_of(source.layer, x, self.full.density, bf16=bf16)
            if form != "conv":
                columns = self.columns or form == "sparse"
                matrix = self._matrix(self.full, x, form, columns)
                return matrix(x, rectified=rectified, columns=columns)
        x = x.to(self.affine.weight.dtype)
        weight, layout = self._laid_out(x)
        out = source.apply(x.contiguous(memory_format=layout), weight, self.affine.bias)
        return out.relu_() if rectified else out

    @torch.compiler.disable
    def _matrix(self, full: Affine, x: Tensor, form: str, columns: bool) -> Matrix:
        """The matrix for maps of this size.

        Raises ValueError when it does not compute what the convolution does. The two are compared
        at the first use of a form alone: later weights go the same way through it.
        """
        key = (x.shape[2:], form)
        if (key, columns) not in self.source.proven:
            self._require_same(full, x, form, columns)
            self.source.proven.add((key, columns))
        if key not in self._matrices:
            dense_bf16 = form == "dense" and self.affine.weight.dtype == torch.bfloat16
            affine = self.affine if dense_bf16 else full
            small_map = self.source.small_map(x.shape[2:])
            self._matrices[key] = small_map.form(form, affine.weight, affine.bias)
        return self._matrices[key]

    def _require_same(self, full: Affine, x: Tensor, form: str, columns: bool) -> None:
        """Raise ValueError unless a matrix computes what the convolution does."""
        weight, bias = full.weight, full.bias
        matrix = self.source.small_map(x.shape[2:]).form(form, weight, bias)
        images = x[: proof.IMAGES].to(weight.dtype)
        plain, fast = (
            proof.passes(run, images, gradient=True)
            for run in (
                lambda x: self.source.apply(x, weight, bias),
                lambda x: matrix(x, rectified=False, columns=columns),
            )
        )
        if reason := proof.difference(plain, fast):
            layer = self.source.layer
            raise ValueError(f"the {form} matrix of {layer} is not its convolution: {reason}")

    def _laid_out(self, x: Tensor) -> tuple[Tensor, torch.memory_format]:
        """The weights in the layout that they and x are to have, and that layout."""
        weight = self.affine.weight
        forward_only = not x.requires_grad and not x.is_cuda and x.dtype == torch.float32
        if not forward_only or x.shape[2] * x.shape[3] > PIXELS:
            return weight, _layout(weight)
        if not self._channels_first:
            self._channels_first.append(weight.contiguous())
        return self._channels_first[0], torch.contiguous_format


Folded = FoldedConvolution | FoldedLinear | FoldedNorm


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The folded layers of a network with the weights of one moment, in the order of its program.

    dtype: what convolutions of an fp32 network compute in and pass on, e.g. bfloat16; None for the
    network's own. Linear layers are small and the logits need their digits: they stay as they are.
    """

    layers: tuple[Folded, ...]
    dtype: torch.dtype | None

    def clone(self) -> "Snapshot":
        """A copy whose weights have memory of their own."""
        layers = (replace(layer, affine=layer.affine.clone()) for layer in self.layers)
        return Snapshot(tuple(layers), self.dtype)

    def tensors(self) -> list[Tensor]:
        """All that it computes with on a GPU, always in the same order."""
        return [tensor for layer in self.layers for tensor in layer.affine.tensors()]


@torch.no_grad()
def fold(sources: "Sequence[Source]", dtype: torch.dtype | None = None) -> Snapshot:
    """The snapshot of layers with the weights that they have now; dtype: see `Snapshot`."""
    found = [source.affine() for source in sources]
    columns = any(affine.density <= NARROW for affine in found)
    layers = (
        source.folded(affine, dtype, columns=columns)
        for source, affine in zip(sources, found, strict=True)
    )
    return Snapshot(tuple(layers), dtype)


# ---------------------------------------------------------------- sources


class Source(Protocol):
    """A layer of the network, which folded layers are made from."""

    def affine(self) -> Affine:
        """Its weight and bias of now, in the network's own precision, batch norm folded in."""

    def folded(self, affine: Affine, dtype: torch.dtype | None, *, columns: bool) -> Folded:
        """The folded layer that computes with them; `columns`: see `FoldedConvolution`."""


@dataclass(frozen=True, eq=False)
class NormSource:
    """Batch norm that no layer takes up."""

    norm: nn.BatchNorm2d

    def affine(self) -> Affine:
        scale, shift = scale_and_shift(self.norm)
        return Affine(scale.view(-1, 1, 1), shift.view(-1, 1, 1))

    def folded(self, affine: Affine, dtype: torch.dtype | None, *, columns: bool) -> FoldedNorm:
        return FoldedNorm(affine.to(dtype))


@dataclass(frozen=True, eq=False)
class LinearSource:
    """A linear layer, with the batch norm and the ReLU after it if there are any."""

    layer: nn.Linear
    norm: nn.BatchNorm2d | None
    rectified: bool

    def affine(self) -> Affine:
        return Affine(*folded_parameters(self.layer, self.norm))

    def folded(self, affine: Affine, dtype: torch.dtype | None, *, columns: bool) -> FoldedLinear:
        return FoldedLinear(affine, self.rectified)


@dataclass(frozen=True, eq=False)
class ConvolutionSource:
    """A convolution, with the batch norm and the ReLU after it if there are any.

    It also keeps what does not depend on weights: where the taps of small maps meet their pixels,
    and which kinds of matrices were compared with the convolution (`FoldedConvolution`).
    """

    layer: nn.Conv2d
    norm: nn.BatchNorm2d | None
    rectified: bool
    proven: set[tuple[tuple[torch.Size, str], bool]] = field(default_factory=set, init=False)
    _small_maps: dict[torch.Size, SmallMap] = field(default_factory=dict, init=False)

    def affine(self) -> Affine:
        weight, bias = folded_parameters(self.layer, self.norm)
        density = 1.0 if weight.is_cuda else int(weight.count_nonzero()) / weight.numel()
        return Affine(weight, bias, density)

    def folded(
        self, affine: Affine, dtype: torch.dtype | None, *, columns: bool
    ) -> FoldedConvolution:
        used = affine.to(dtype)
        weight = used.weight.contiguous(memory_format=_layout(used.weight))
        full = None if weight.is_cuda else affine
        return FoldedConvolution(self, replace(used, weight=weight), full, columns)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with other weights than its own."""
        if isinstance(self.layer, TensorFlowConv2d):
            x = self.layer.padded(x)
        return self.layer._conv_forward(x, weight, bias)

    def small_map(self, size: torch.Size) -> SmallMap:
        """The convolution of maps of this height and width."""
        if size not in self._small_maps:
            self._small_maps[size] = SmallMap(self.layer, *size)
        return self._small_maps[size]


def folded_parameters(
    layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None
) -> tuple[Tensor, Tensor | None]:
    """A copy of weight and bias, with batch norm in eval mode folded in.

    weight * g and (bias - mean) * g + beta, with g = gamma / sqrt(variance + eps).
    `torch.nn.utils.fusion` has the same formula and gives the same weights, but a bias whose last
    digit differs, because it multiplies in another order: the crafted images would change.
    """
    weight, bias = layer.weight.detach(), layer.bias
    if norm is None:
        return weight.clone(), None if bias is None else bias.detach().clone()
    scale, shift = scale_and_shift(norm)
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight, shift if bias is None else bias.detach() * scale + shift


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as x * scale + shift, one of each a channel."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def require_plain(module: nn.Module) -> None:
    """Raise ValueError for a layer that does something else than its kind."""
    code = type(module).forward, getattr(type(module), "_conv_forward", None)
    convolution = nn.Conv2d._conv_forward
    if code not in (
        (nn.Conv2d.forward, convolution),
        (TensorFlowConv2d.forward, convolution),
        (nn.Linear.forward, None),
        (nn.BatchNorm2d.forward, None),
    ):
        raise ValueError(f"{type(module).__name__} has a forward of its own")


def _layout(weight: Tensor) -> torch.memory_format:
    """What a convolution with these weights wants."""
    wide = weight.numel() > MANY_WEIGHTS and not weight.is_cuda and weight.dtype != torch.bfloat16
    return torch.contiguous_format if wide else torch.channels_last
