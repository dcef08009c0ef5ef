"""Folded layers: fixed weights with batch norm folded in, in a memory format for the device.

A *source* is a layer of the network with the batch norm and the ReLU after it. A *folded layer*
computes the same function with the weights at one moment. A *snapshot* has the folded layers of a
network. A source is valid until the structure of the network changes. A folded layer never changes.
It stores only values that can be computed again from its weights.

The memory format of convolutions, and the layers for which a CPU is faster with matrices
(`small_maps`), were chosen by measurement (docs/speed.md). They depend only on shapes and weights.
So a repeated run gives the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.fast import proof
from robsparse.fast.small_maps import NARROW, PIXELS, Matrix, SmallMap, choose_form
from robsparse.models._layers import TensorFlowConv2d

# With more weights than this, a convolution in fp32 on a CPU is faster with channels first.
MANY_WEIGHTS = 2**20


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
    """Batch norm without a layer before it: x * weight + bias, with one value per channel."""

    affine: Affine

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.affine.weight, self.affine.bias
        assert bias is not None
        return torch.addcmul(bias, x.to(weight.dtype), weight)


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
    """A convolution, with a ReLU if the network has one. A CPU uses a matrix if it is faster.

    affine: weight and bias in the precision of the computation.
    full: weight and bias in the precision of the network, for matrices. None on a GPU.
    columns: whether small maps have images innermost in memory, as sparse matrices need it
        (`small_maps`).
    """

    source: "ConvolutionSource"
    affine: Affine
    full: Affine | None
    columns: bool
    # Computed from the weights above at the first use.
    _matrices: dict[tuple[torch.Size, str], Matrix] = field(default_factory=dict, init=False)
    _channels_first: list[Tensor] = field(default_factory=list, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        source, rectified = self.source, self.source.rectified
        if self.full is not None:
            bf16 = self.affine.weight.dtype == torch.bfloat16
            form = choose_form(source.layer, x, self.full.density, bf16=bf16)
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
        """Return the matrix for maps of this size.

        At the first use of a form, it is compared with the convolution. Later weights use the same
        code, so they are not compared again.

        Raises:
            ValueError: if the results of matrix and convolution differ.
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
        """Raise ValueError if the results of the matrix and the convolution differ."""
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
            raise ValueError(f"the {form} matrix of {layer} differs from the convolution: {reason}")

    def _laid_out(self, x: Tensor) -> tuple[Tensor, torch.memory_format]:
        """Return the weights in the memory format for x, and this memory format."""
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
    """The folded layers of a network with the weights at one moment, in the order of its program.

    dtype: precision of the convolutions of an fp32 network, e.g. bfloat16. None: the precision of
        the network. Linear layers always keep the precision of the network, because they are small
        and the logits need it.
    """

    layers: tuple[Folded, ...]
    dtype: torch.dtype | None

    def clone(self) -> "Snapshot":
        """Return a copy with weights in separate memory."""
        layers = (replace(layer, affine=layer.affine.clone()) for layer in self.layers)
        return Snapshot(tuple(layers), self.dtype)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that it uses on a GPU, always in the same order."""
        return [tensor for layer in self.layers for tensor in layer.affine.tensors()]


@torch.no_grad()
def fold(sources: "Sequence[Source]", dtype: torch.dtype | None = None) -> Snapshot:
    """Return a snapshot with the current weights of the sources. dtype: see `Snapshot`."""
    found = [source.affine() for source in sources]
    columns = any(affine.density <= NARROW for affine in found)
    layers = (
        source.folded(affine, dtype, columns=columns)
        for source, affine in zip(sources, found, strict=True)
    )
    return Snapshot(tuple(layers), dtype)


# ---------------------------------------------------------------- sources


class Source(Protocol):
    """A layer of the network. Folded layers are made from it."""

    def affine(self) -> Affine:
        """Return the current weight and bias in the precision of the network, with batch norm."""

    def folded(self, affine: Affine, dtype: torch.dtype | None, *, columns: bool) -> Folded:
        """Return the folded layer with this affine. columns: see `FoldedConvolution`."""


@dataclass(frozen=True, eq=False)
class NormSource:
    """Batch norm without a layer before it."""

    norm: nn.BatchNorm2d

    def affine(self) -> Affine:
        scale, shift = scale_and_shift(self.norm)
        return Affine(scale.view(-1, 1, 1), shift.view(-1, 1, 1))

    def folded(self, affine: Affine, dtype: torch.dtype | None, *, columns: bool) -> FoldedNorm:
        return FoldedNorm(affine.to(dtype))


@dataclass(frozen=True, eq=False)
class LinearSource:
    """A linear layer, with batch norm and ReLU after it if there are any."""

    layer: nn.Linear
    norm: nn.BatchNorm2d | None
    rectified: bool

    def affine(self) -> Affine:
        return Affine(*folded_parameters(self.layer, self.norm))

    def folded(self, affine: Affine, dtype: torch.dtype | None, *, columns: bool) -> FoldedLinear:
        return FoldedLinear(affine, self.rectified)


@dataclass(frozen=True, eq=False)
class ConvolutionSource:
    """A convolution, with batch norm and ReLU after it if there are any.

    It also stores values that do not depend on weights: the pixels of the kernel taps of small
    maps, and the kinds of matrices that were compared with the convolution (`FoldedConvolution`).
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
        """Return the result of the convolution with the given weight and bias."""
        if isinstance(self.layer, TensorFlowConv2d):
            x = self.layer.padded(x)
        return self.layer._conv_forward(x, weight, bias)

    def small_map(self, size: torch.Size) -> SmallMap:
        """Return the convolution for maps of this height and width."""
        if size not in self._small_maps:
            self._small_maps[size] = SmallMap(self.layer, *size)
        return self._small_maps[size]


def folded_parameters(
    layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None
) -> tuple[Tensor, Tensor | None]:
    """Return a copy of weight and bias, with batch norm in eval mode folded in.

    They are weight * g and (bias - mean) * g + beta, with g = gamma / sqrt(variance + eps).
    `torch.nn.utils.fusion` uses the same formula and gives the same weights. Its bias differs in
    the last digit, because it multiplies in another order. This would change the crafted images.
    """
    weight, bias = layer.weight.detach(), layer.bias
    if norm is None:
        return weight.clone(), None if bias is None else bias.detach().clone()
    scale, shift = scale_and_shift(norm)
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight, shift if bias is None else bias.detach() * scale + shift


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


def _layout(weight: Tensor) -> torch.memory_format:
    """Return the fast memory format for a convolution with these weights."""
    wide = weight.numel() > MANY_WEIGHTS and not weight.is_cuda and weight.dtype != torch.bfloat16
    return torch.contiguous_format if wide else torch.channels_last
