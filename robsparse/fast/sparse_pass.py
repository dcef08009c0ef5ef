"""The training pass of a sparse network: its cost depends on the active connections.

Inside `sparse_pass`, the convolutions whose active positions are known multiply active weights
only, and compute gradients of active weights only. All other gradients of weights are 0. The code
of the network runs unchanged: a mode of torch replaces the functions that its layers call. Maps
have images innermost in memory between the layers.

Either all these convolutions are computed in the sparse way or none, whichever has the smaller
total cost (`robsparse.fast.costs`). A mixture would convert maps between layers, in memory format
and in precision: the sparse kernels compute in the precision of the network, the dense way in that
of the training pass. In equal precision, the results of both differ by rounding only.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from robsparse.compute.perturb import batch_norm_mode
from robsparse.fast import costs
from robsparse.fast.folded_layers import require_plain
from robsparse.fast.structure import observed
from robsparse.fast.train_norms import Norms
from robsparse.kernels.geometry import Geometry, Pair
from robsparse.kernels.library import library
from robsparse.kernels.maps import images_innermost, is_innermost
from robsparse.kernels.patterns import Pattern, SparseConvolution
from robsparse.kernels.pools import max_pool, mean_pool
from robsparse.sparsity.compact_weight import CompactWeight
from robsparse.sparsity.layers import active_mask, prunable


@contextmanager
def sparse_pass(
    model: nn.Module, x_NCHW: Tensor, dtype: torch.dtype, used: dict[str, str]
) -> Iterator[None]:
    """Compute the convolutions of a network by their active weights inside the block, on a CPU.

    Only gradients of active weights are computed: `robsparse.sparsity.layers.active_mask` gives the
    active positions. Layers without a known mask are computed as usual.

    Args:
        model: the network. Its weights keep their tensors inside the block.
        x_NCHW: the batch. Its size decides how the convolutions are computed.
        dtype: precision of dense convolutions of an fp32 network.
        used: gets "sparse" or "dense" for each layer with a known mask that runs, by its name.
    """
    found = {}
    for name, layer in prunable(model).items():
        if isinstance(layer, nn.Conv2d) and _is_suitable(layer):
            known, weight = _KNOWN.setdefault(layer, _Known()), layer.weight
            if isinstance(weight, CompactWeight):
                found[id(weight)] = _Layer(name, weight, known.follow(weight.positions), known)
            elif (mask := active_mask(layer)) is not None:
                found[id(weight)] = _Layer(name, weight, known.update(mask), known)
    if not found or library() is None:
        yield
        return
    mode = _Mode(found, Norms(model), used)
    mode.sparse = _pays(model, mode, x_NCHW, dtype)
    with mode:
        yield
    mode.norms.require_used()


def _pays(model: nn.Module, mode: "_Mode", x_NCHW: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the sparse way costs less than the dense one for the layers of a mode."""
    geometries = _geometries(model, mode, x_NCHW)
    layers = [layer for layer in mode.layers.values() if layer.name in geometries]
    found = [
        costs.training_costs_of(
            geometries[layer.name], (dtype, layer.weight.dtype), costs.images_class(len(x_NCHW))
        )
        for layer in layers
    ]
    return costs.pays(found, [len(layer.positions) / layer.weight.numel() for layer in layers])


def _geometries(model: nn.Module, mode: "_Mode", x_NCHW: Tensor) -> dict[str, Geometry]:
    """Return the geometry of each layer of a mode for these images, by its name.

    A pass over two images finds them. It changes neither the network nor the random numbers.
    """
    kinds = _GEOMETRIES.setdefault(model, {})
    kind = (*x_NCHW.shape[1:], *(layer.name for layer in mode.layers.values()))
    if kind not in kinds:
        dense = _Mode(mode.layers, mode.norms, {})
        with observed(model, x_NCHW.device), batch_norm_mode(model, "eval"), torch.no_grad(), dense:
            model(x_NCHW[:2])
        kinds[kind] = dense.geometries
    return kinds[kind]


def paused() -> AbstractContextManager[None]:
    """Return a block without the mode of `sparse_pass`, for a view that computes its layers."""
    active = torch._C._len_torch_function_stack() > 0
    return _pop_mode_temporarily() if active else nullcontext()


def _is_suitable(layer: nn.Conv2d) -> bool:
    """Return whether the kernels can compute a layer."""
    try:
        require_plain(layer)
    except ValueError:
        return False
    kinds = layer.weight.dtype in (torch.float32, torch.float64) and layer.weight.is_cpu
    return kinds and layer.groups == 1 and layer.padding_mode == "zeros"


class _Known:
    """The active positions of a layer, and their last pattern for each size of maps."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.version = -1
        self.positions: Tensor | None = None
        self.patterns: dict[Geometry, Pattern] = {}

    def update(self, mask: Tensor) -> Tensor:
        """Return the positions of a mask. A mask that has not changed is not read again."""
        if self.mask is not mask or self.version != mask._version or self.positions is None:
            self.mask, self.version = mask, mask._version
            return self.follow(mask.reshape(-1).nonzero().squeeze(1))
        return self.positions

    def follow(self, positions: Tensor) -> Tensor:
        """Take these positions. If they are the same as before, the patterns are kept."""
        if self.positions is None or not torch.equal(self.positions, positions):
            self.positions, self.patterns = positions, {}
        return self.positions

    def pattern(self, geometry: Geometry, dtype: torch.dtype) -> Pattern:
        """Return the pattern of the positions."""
        if geometry not in self.patterns:
            assert self.positions is not None
            self.patterns[geometry] = Pattern(geometry, self.positions, dtype)
        return self.patterns[geometry]


_Geometries = dict[tuple[object, ...], dict[str, Geometry]]  # by the kind of images and layers
_GEOMETRIES: "weakref.WeakKeyDictionary[nn.Module, _Geometries]" = weakref.WeakKeyDictionary()
_KNOWN: "weakref.WeakKeyDictionary[nn.Conv2d, _Known]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Layer:
    """A convolution inside the block: its name, its weight, and its active positions."""

    name: str
    weight: Tensor
    positions: Tensor
    known: _Known


class _Convolution(torch.autograd.Function):
    """A sparse convolution with one value for each position of a pattern."""

    @staticmethod
    def forward(
        ctx: Any, x_NCHW: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern
    ) -> Tensor:
        x_NCHW = images_innermost(x_NCHW.to(pattern.dtype))
        ctx.convolution = SparseConvolution(pattern, values)
        ctx.save_for_backward(x_NCHW)
        return ctx.convolution.output(x_NCHW, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        convolution: SparseConvolution = ctx.convolution
        (x_NCHW,) = ctx.saved_tensors
        upstream = images_innermost(upstream.to(convolution.pattern.dtype))
        needs_x, needs_values, needs_bias, _ = ctx.needs_input_grad
        x_gradient = convolution.input_gradient(upstream) if needs_x else None
        gradient = convolution.weight_gradient(x_NCHW, upstream) if needs_values else None
        bias_gradient = None
        if needs_bias:
            bias_gradient = upstream.permute(2, 3, 1, 0).flatten(0, 1).sum((0, 2))
        return x_gradient, gradient, bias_gradient, None


def _active_values(weight: Tensor, positions: Tensor) -> Tensor:
    """Return the values at the active positions. All other weights get the gradient 0."""
    if isinstance(weight, CompactWeight):
        return weight.active_values
    return weight.reshape(-1).index_select(0, positions)


class _Mode(TorchFunctionMode):
    """Replaces the functions that layers call.

    layers: by the identity of the weight. norms: for batch norm, and sums and ReLUs after it.
    used: see `sparse_pass`. sparse: whether the layers are computed in the sparse way.
    geometries: those of the layers that were called, by name.
    """

    def __init__(self, layers: dict[int, _Layer], norms: Norms, used: dict[str, str]) -> None:
        super().__init__()
        self.layers, self.norms, self.used, self.sparse = layers, norms, used, False
        self.geometries: dict[str, Geometry] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and len(args) == 7 and not kwargs:
            return self._convolution(*args)
        if (computed := self.norms.computed(func, args, kwargs)) is not None:
            return computed
        if func in _POOLS:
            return _POOLS[func](*args, **kwargs)
        x = args[0] if args else None
        if func in _CHANNELS_FIRST and isinstance(x, Tensor) and x.ndim == 4:
            if func is F.batch_norm:
                return _batch_norm(*args, **kwargs)
            return func(_for_torch(x), *args[1:], **kwargs)
        if func is Tensor.view and isinstance(x, Tensor) and not x.is_contiguous():
            func = Tensor.reshape  # the code of the network expects maps with channels first
        return func(*args, **kwargs)

    def _convolution(
        self, x_NCHW: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> Tensor:
        layer = self.layers.get(id(weight))
        if layer is None or isinstance(options[1], str) or x_NCHW.ndim != 4:
            return F.conv2d(_for_torch(x_NCHW), weight, bias, *options)
        try:
            geometry = _geometry(tuple(weight.shape), x_NCHW.shape, options)
        except ValueError:  # beyond the limits of the kernels
            return F.conv2d(_for_torch(x_NCHW), weight, bias, *options)
        self.geometries[layer.name] = geometry
        self.used[layer.name] = "sparse" if self.sparse else "dense"
        if self.sparse:
            pattern = layer.known.pattern(geometry, weight.dtype)
            values = _active_values(weight, pattern.positions)
            return _Convolution.apply(x_NCHW, values, bias, pattern)
        return F.conv2d(_for_torch(x_NCHW), weight, bias, *options)


# Functions that get maps with channels first, because torch is slow or wrong for other formats.
_CHANNELS_FIRST = {F.batch_norm, torch.max_pool2d, F.avg_pool2d}
# Functions for maps in any memory format.
_POOLS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.max_pool2d: max_pool,
    F.adaptive_avg_pool2d: mean_pool,
}


def _for_torch(x_NCHW: Tensor) -> Tensor:
    """Return the map with channels first if it has images innermost."""
    if x_NCHW.ndim != 4:
        return x_NCHW
    kept = x_NCHW.is_contiguous() or x_NCHW.is_contiguous(memory_format=torch.channels_last)
    return x_NCHW if kept else x_NCHW.contiguous()


def _batch_norm(x_NCHW: Tensor, *given: Any, **named: Any) -> Tensor:
    """Apply batch norm to a map. With images innermost it is not copied."""
    if not is_innermost(x_NCHW):
        return F.batch_norm(_for_torch(x_NCHW), *given, **named)
    height, width = x_NCHW.shape[2:]
    lines = x_NCHW.permute(2, 3, 1, 0).flatten(0, 1)  # pixels, channels, images
    out = F.batch_norm(lines, *given, **named)
    return out.unflatten(0, (height, width)).permute(3, 2, 0, 1)


def _geometry(weight: tuple[int, ...], x: torch.Size, options: tuple[Any, ...]) -> Geometry:
    """Return the geometry of a convolution from the arguments of its function."""
    stride, padding, dilation = (_pair(option) for option in options[:3])
    size = _pair(x[2:])
    outputs, inputs, *kernel = weight
    out = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    return Geometry((outputs, inputs, *_pair(kernel)), size, _pair(out), stride, padding, dilation)


def _pair(value: Any) -> Pair:
    first, second = value
    return int(first), int(second)
