"""Folded layers: fixed weights with batch norm folded in, in a memory format for the device.

A *source* is a layer of the network with the batch norm and the ReLU after it. A *folded layer*
computes the same function with the weights at one moment. A *snapshot* has the folded layers of a
network. A source is valid until the structure of the network changes. A folded layer never changes.
It stores only values that can be computed again from its weights.

On a CPU, a folded convolution has several forms (`forms`). Their costs are measured (`costs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.fast import costs, proof
from robsparse.fast.forms import (
    Form,
    Kind,
    MatrixForm,
    PlainForm,
    SparseForm,
    apply,
    finish,
    gated,
    geometry_of,
)
from robsparse.kernels.geometry import Geometry, Pair
from robsparse.kernels.patterns import Pattern
from robsparse.models._layers import TensorFlowConv2d
from robsparse.sparsity.compact_weight import CompactWeight


@dataclass(frozen=True, eq=False)
class Affine:
    """Weight and bias of a folded layer. The network does not share their memory.

    density: share of nonzero weights. It is counted only for convolutions on a CPU; otherwise 1.
    """

    weight: Tensor
    bias: Tensor | None
    density: float = 1.0

    def to(self, dtype: torch.dtype | None) -> "Affine":
        """Return a copy in another precision if one is given and this is fp32, otherwise itself."""
        if dtype is None or self.weight.dtype != torch.float32:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return Affine(self.weight.to(dtype), bias, self.density)

    def tensors(self) -> list[Tensor]:
        """Return the weight and, if there is one, the bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def clone(self) -> "Affine":
        """Return a copy in separate memory."""
        bias = None if self.bias is None else self.bias.clone()
        return Affine(self.weight.clone(), bias, self.density)


# ---------------------------------------------------------------- folded layers


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """Batch norm without a layer before it, followed by a ReLU if `rectified`.

    It computes x * weight + bias, with one value per channel. It is also its own form (`Form`).
    """

    affine: Affine
    rectified: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.output(x, None, rectified=self.rectified)

    def output(self, x_NCHW: Tensor, other: Tensor | None, *, rectified: bool) -> Tensor:
        weight, bias = self.affine.weight, self.affine.bias
        assert bias is not None
        return finish(torch.addcmul(bias, x_NCHW.to(weight.dtype), weight), other, rectified)

    def input_gradient(self, upstream: Tensor, other: Tensor | None, gate: Tensor | None) -> Tensor:
        return gated(upstream * self.affine.weight, other, gate)


@dataclass(frozen=True, eq=False)
class FoldedLinear:
    """A linear layer, followed by a ReLU if `rectified`."""

    affine: Affine
    rectified: bool

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.affine.weight, self.affine.bias
        out = F.linear(x.to(weight.dtype), weight, bias)
        return out.relu_() if self.rectified else out


@dataclass(frozen=True, eq=False)
class FoldedConvolution:
    """A convolution, with the addition of another map and a ReLU if the network has them.

    affine: weight and bias in the precision of the computation.
    full: weight and bias in the precision of the network, for the sparse kernels.
    """

    source: "ConvolutionSource"
    affine: Affine
    full: Affine
    _forms: dict[tuple[Pair, Kind], Form] = field(default_factory=dict, init=False)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the output. torch records the gradient."""
        weight = self.affine.weight
        x = x.to(weight.dtype).contiguous(memory_format=torch.channels_last)
        out = apply(self.source.layer, x, weight, self.affine.bias)
        return finish(out, other, self.source.rectified)

    def form(self, kind: Kind, size: Pair) -> Form:
        """Return a form for maps of this size.

        At the first use of a form, it is compared with the convolution. Later weights use the same
        code, so they are not compared again.

        Raises:
            ValueError: if their results differ.
        """
        if (size, kind) not in self._forms:
            form = self._forms[size, kind] = self._make(kind, size)
            if (size, kind) not in self.source.proven:
                self._require_same(form, kind, size)
                self.source.proven.add((size, kind))
        return self._forms[size, kind]

    def _make(self, kind: Kind, size: Pair) -> Form:
        geometry = self.source.geometry(size)
        assert geometry is not None  # `Plan` asks before
        if kind == "sparse":
            pattern = self.source.pattern(geometry, self.full.weight)
            return SparseForm(pattern, self.full.weight, self.full.bias)
        weight, bias = self.affine.weight, self.affine.bias
        if kind == "matrix":
            return MatrixForm(geometry, weight, bias)
        return PlainForm(self.source.layer, geometry, weight, bias, kind)

    def _require_same(self, form: Form, kind: Kind, size: Pair) -> None:
        """Raise ValueError if the results of a form and the convolution differ."""
        layer, affine = self.source.layer, self.full if kind == "sparse" else self.affine
        weight, bias = affine.weight, affine.bias
        draw = torch.Generator().manual_seed(0)
        x = torch.rand(proof.IMAGES, layer.in_channels, *size, generator=draw).to(weight.dtype)
        plain = proof.passes(lambda x: apply(layer, x, weight, bias), x, gradient=True)
        slopes = proof.slopes_of(plain.outputs)
        with torch.no_grad():
            outputs = form.output(x, None, rectified=False)
            fast = proof.Passes(outputs, form.input_gradient(slopes, None, None))
        if reason := proof.difference(plain, fast):
            raise ValueError(f"the {kind} form of {layer} differs from the convolution: {reason}")


Folded = FoldedConvolution | FoldedLinear | FoldedNorm


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The folded layers of a network with the weights at one moment, in the order of its program.

    dtype: precision of the convolutions of an fp32 network, e.g. bfloat16. None: the precision of
        the network. Linear layers always keep the precision of the network, because they are small
        and the logits need it.
    """

    layers: tuple[Folded, ...]
    dtype: torch.dtype | None
    _forms: dict[tuple[object, ...], dict[int, Form]] = field(default_factory=dict, init=False)

    def forms(self, sizes: dict[int, Pair], images: int) -> dict[int, Form]:
        """Return the form of each convolution that has several, on a CPU.

        Args:
            sizes: height and width of the input map of each convolution, by its number.
            images: the number of images in the batch.

        Raises:
            ValueError: if the results of a form and its convolution differ.
        """
        key = (costs.images_class(images), *sizes.items())
        if key not in self._forms:
            forms: dict[int, Form] = {}
            for number, kind in self.kinds(sizes, images).items():
                layer = self.layers[number]
                assert isinstance(layer, FoldedConvolution)
                forms[number] = layer.form(kind, sizes[number])
            norms = {
                n: layer for n, layer in enumerate(self.layers) if isinstance(layer, FoldedNorm)
            }
            self._forms[key] = forms | norms
        return self._forms[key]

    def kinds(self, sizes: dict[int, Pair], images: int) -> dict[int, Kind]:
        """Return the kind of form of each convolution. Their total cost is the smallest one."""
        found: dict[int, tuple[costs.Costs, float]] = {}
        for number, size in sizes.items():
            layer = self.layers[number]
            geometry = layer.source.geometry(size) if isinstance(layer, FoldedConvolution) else None
            if isinstance(layer, FoldedConvolution) and geometry is not None:
                dtypes = layer.affine.weight.dtype, layer.full.weight.dtype
                cost = costs.costs_of(
                    layer.source.layer, geometry, dtypes, costs.images_class(images)
                )
                found[number] = cost, layer.full.density
        chosen = costs.choose(*zip(*found.values(), strict=True)) if found else []
        return dict(zip(found, chosen, strict=True))

    def clone(self) -> "Snapshot":
        """Return a copy with weights in separate memory."""
        layers = (replace(layer, affine=layer.affine.clone()) for layer in self.layers)
        return Snapshot(tuple(layers), self.dtype)

    def dense(self) -> "Snapshot":
        """Return a snapshot with dense weights: itself, or a copy if a weight is compact."""
        compact = any(isinstance(layer.affine.weight, CompactWeight) for layer in self.layers)
        return self.clone() if compact else self

    def tensors(self) -> list[Tensor]:
        """Return all tensors that it uses on a GPU, always in the same order."""
        return [tensor for layer in self.layers for tensor in layer.affine.tensors()]


@torch.no_grad()
def fold(sources: "Sequence[Source]", dtype: torch.dtype | None = None) -> Snapshot:
    """Return a snapshot with the current weights of the sources. dtype: see `Snapshot`."""
    return Snapshot(tuple(source.folded(source.affine(), dtype) for source in sources), dtype)


# ---------------------------------------------------------------- sources


class Source(Protocol):
    """A layer of the network. Folded layers are made from it."""

    def affine(self) -> Affine:
        """Return the current weight and bias in the precision of the network, with batch norm."""

    def folded(self, affine: Affine, dtype: torch.dtype | None) -> Folded:
        """Return the folded layer with this affine."""


@dataclass(frozen=True, eq=False)
class NormSource:
    """Batch norm without a layer before it, with a ReLU after it if there is one."""

    norm: nn.BatchNorm2d
    rectified: bool

    def affine(self) -> Affine:
        scale, shift = scale_and_shift(self.norm)
        return Affine(scale.view(-1, 1, 1), shift.view(-1, 1, 1))

    def folded(self, affine: Affine, dtype: torch.dtype | None) -> FoldedNorm:
        return FoldedNorm(affine.to(dtype), self.rectified)


@dataclass(frozen=True, eq=False)
class LinearSource:
    """A linear layer, with batch norm and ReLU after it if there are any."""

    layer: nn.Linear
    norm: nn.BatchNorm2d | None
    rectified: bool

    def affine(self) -> Affine:
        return Affine(*folded_parameters(self.layer, self.norm))

    def folded(self, affine: Affine, dtype: torch.dtype | None) -> FoldedLinear:
        return FoldedLinear(affine, self.rectified)


@dataclass(frozen=True, eq=False)
class ConvolutionSource:
    """A convolution, with batch norm, the addition of another map and ReLU after it, if present.

    It also stores values that do not depend on the current weights: the geometry for each size of
    maps, the forms that were compared with the convolution, and the last sparse pattern.
    """

    layer: nn.Conv2d
    norm: nn.BatchNorm2d | None
    rectified: bool
    proven: set[tuple[Pair, Kind]] = field(default_factory=set, init=False)
    _geometries: dict[Pair, Geometry | None] = field(default_factory=dict, init=False)
    _patterns: dict[Geometry, Pattern] = field(default_factory=dict, init=False)

    def affine(self) -> Affine:
        weight, bias = folded_parameters(self.layer, self.norm, compact=True)
        if weight.is_cuda:
            return Affine(weight, bias)
        values = weight.active_values if isinstance(weight, CompactWeight) else weight
        return Affine(weight, bias, int(values.count_nonzero()) / weight.numel())

    def folded(self, affine: Affine, dtype: torch.dtype | None) -> FoldedConvolution:
        used = affine.to(dtype)
        if not isinstance(used.weight, CompactWeight):
            weight = used.weight.contiguous(memory_format=torch.channels_last)
            used = replace(used, weight=weight)
        return FoldedConvolution(self, used, affine)

    def geometry(self, size: Pair) -> Geometry | None:
        """Return the geometry for maps of this height and width, or None without other forms."""
        if size not in self._geometries:
            self._geometries[size] = geometry_of(self.layer, size)
        return self._geometries[size]

    def pattern(self, geometry: Geometry, weight: Tensor) -> Pattern:
        """Return the pattern of the nonzero weights. The last one is used again if it fits."""
        if isinstance(weight, CompactWeight):
            positions = weight.positions[weight.active_values != 0]
        else:
            positions = weight.contiguous().view(-1).nonzero().squeeze(1)
        last = self._patterns.get(geometry)
        if last is None or not torch.equal(last.positions, positions):
            last = self._patterns[geometry] = Pattern(geometry, positions, weight.dtype)
        return last


def folded_parameters(
    layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None, *, compact: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return a copy of weight and bias, with batch norm in eval mode folded in.

    With `compact`, the result for a `CompactWeight` is one too. Otherwise it is dense.

    They are weight * g and (bias - mean) * g + beta, with g = gamma / sqrt(variance + eps).
    `torch.nn.utils.fusion` uses the same formula and gives the same weights. Its bias differs in
    the last digit, because it multiplies in another order. This would change the crafted images.
    """
    weight, bias, scale = layer.weight, layer.bias, None
    if norm is not None:
        scale, shift = scale_and_shift(norm)
        bias = shift if bias is None else bias.detach() * scale + shift
    elif bias is not None:
        bias = bias.detach().clone()
    if compact and isinstance(weight, CompactWeight):
        return weight.scaled(scale), bias
    weight = weight.detach()
    if scale is None:
        return weight.clone(), bias
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), bias


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift for each channel: batch norm in eval mode is x * scale + shift."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def require_plain(module: nn.Module) -> None:
    """Raise ValueError if the class of a layer has another forward than its kind."""
    code = type(module).forward, getattr(type(module), "_conv_forward", None)
    convolution = nn.Conv2d._conv_forward
    if code not in (
        (nn.Conv2d.forward, convolution),
        (TensorFlowConv2d.forward, convolution),
        (nn.Linear.forward, None),
        (nn.BatchNorm2d.forward, None),
    ):
        raise ValueError(f"{type(module).__name__} has a custom forward")
