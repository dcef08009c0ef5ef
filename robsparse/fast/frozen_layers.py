"""The layers of a frozen view: weights formed once, batch norm folded in, laid out for the device.

Which layout convolutions want, and where a CPU is faster without them (`small_maps`), was measured
(docs/speed.md); it follows from shapes and live weights alone, so that the same run gives the same
bits again.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.fast import proof
from robsparse.fast.small_maps import PIXELS, SmallMap, form_of
from robsparse.models._layers import TensorFlowConv2d

# Weights of a convolution from which a CPU is faster at fp32 with channels first.
MANY_WEIGHTS = 2**20


class Weighted(nn.Module):
    """A convolution or linear layer, with the batch norm and the ReLU after it if there are any."""

    def __init__(self, layer: nn.Module, norm: nn.BatchNorm2d | None, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.plain: Tensor | None = None  # the weights, channels first, once they are asked for
        self.__dict__["layer"], self.__dict__["norm"] = layer, norm
        self.__dict__["apply"] = _how(layer)
        self.live = 1.0  # share of the weights that are not 0
        self.columns = False  # whether other layers of the view are sparse: see `small_maps`
        # What small maps use: the weights in the network's own precision, and by the size of the
        # map and the form its matrix, with those of the last refresh that it was formed in.
        self.full: tuple[Tensor, Tensor | None] | None = None
        self.small: dict[tuple[torch.Size, str], SmallMap] = {}
        self.formed: set[tuple[torch.Size, str]] = set()
        self.proven: set[tuple] = set()  # what was compared with the convolution

    def refresh(self, dtype: torch.dtype | None) -> None:
        """weight * g and (bias - mean) * g + beta, with g = gamma / sqrt(variance + eps).

        dtype: what convolutions with fp32 weights compute in, None for fp32. Linear layers are
        small and the logits need their digits: they stay as they are.
        """
        weight, bias = self.layer.weight.detach(), self.layer.bias
        bias = None if bias is None else bias.detach()
        if self.norm is not None:
            scale, shift = scale_and_shift(self.norm)
            weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
            bias = shift if bias is None else bias * scale + shift
        if weight.ndim == 4 and not weight.is_cuda:
            self.live = int(weight.count_nonzero()) / weight.numel()
            self.full, self.formed = (weight, bias), set()
        if weight.ndim == 4 and dtype is not None and weight.dtype == torch.float32:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if weight.ndim == 4:
            weight = weight.contiguous(memory_format=_layout(weight))
        self.plain = None
        self.weight, self.bias = renewed(self.weight, weight), renewed(self.bias, bias)

    def memory(self) -> Tensor | None:
        """What it computes with; the same tensor as long as refreshing keeps its memory."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 2:
            out = self.apply(x.to(self.weight.dtype), self.weight, self.bias)
            return out.relu_() if self.rectified else out
        if not x.is_cuda:
            form = form_of(self.layer, x, self.live, bf16=self.weight.dtype == torch.bfloat16)
            if form != "conv":
                return self._small_map(x, form)
        x = x.to(self.weight.dtype)
        weight, layout = self._laid_out(x)
        out = self.apply(x.contiguous(memory_format=layout), weight, self.bias)
        return out.relu_() if self.rectified else out

    def _small_map(self, x: Tensor, form: str) -> Tensor:
        """The convolution by its matrix, formed where it is first asked for after a refresh.

        Raises ValueError when it does not compute what the convolution does. They are compared at
        the first use of a form alone: later weights go the same way through it.
        """
        key = (x.shape[2:], form)
        columns = self.columns or form == "sparse"
        if key not in self.small:
            self.small[key] = SmallMap(self.layer, *x.shape[2:])
        if (key, columns) not in self.proven:
            self._prove(self.small[key], x, form, columns)
            self.proven.add((key, columns))
        dense_bf16 = form == "dense" and self.weight.dtype == torch.bfloat16
        weight, bias = (self.weight, self.bias) if dense_bf16 else self.full
        if key not in self.formed:
            self.small[key].form(form, weight, bias)
            self.formed.add(key)
        return self.small[key](x.to(weight.dtype), rectified=self.rectified, columns=columns)

    @torch.compiler.disable
    def _prove(self, matrix: SmallMap, x: Tensor, form: str, columns: bool) -> None:
        """Raise ValueError unless a matrix computes what the convolution does, in full precision.

        It has to be formed again afterwards.
        """
        weight, bias = self.full
        matrix.form(form, weight, bias)
        self.formed.discard((x.shape[2:], form))
        images = x[: proof.IMAGES].to(weight.dtype)
        plain, fast = (
            proof.passes(run, images, gradient=True)
            for run in (
                lambda x: self.apply(x, weight, bias),
                lambda x: matrix(x, rectified=False, columns=columns),
            )
        )
        if said := proof.difference(plain, fast):
            raise ValueError(f"the {form} matrix of {self.layer} is not its convolution: {said}")

    def _laid_out(self, x: Tensor) -> tuple[Tensor, torch.memory_format]:
        """The weights of a convolution, and the layout that they and x have."""
        forward_only = not x.requires_grad and not x.is_cuda and x.dtype == torch.float32
        if not forward_only or x.shape[2] * x.shape[3] > PIXELS:
            return self.weight, _layout(self.weight)
        if self.plain is None:
            self.plain = self.weight.contiguous()
        return self.plain, torch.contiguous_format


class Norm(nn.Module):
    """Batch norm that no layer takes up."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.__dict__["norm"] = norm
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None

    def refresh(self, dtype: torch.dtype | None) -> None:
        """Form scale and shift, as `Weighted.refresh` does."""
        scale, shift = (value.view(-1, 1, 1) for value in scale_and_shift(self.norm))
        if dtype is not None and scale.dtype == torch.float32:
            scale, shift = scale.to(dtype), shift.to(dtype)
        self.scale, self.shift = renewed(self.scale, scale), renewed(self.shift, shift)

    def memory(self) -> Tensor | None:
        """As of `Weighted`."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x.to(self.scale.dtype), self.scale)


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch norm in eval mode as x * scale + shift, one of each a channel."""
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def renewed(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """A copy of `new`, in the memory of `old` if that is alike: a CUDA graph goes on reading it."""
    if new is None:
        return None
    kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in (old, new) if t is not None]
    return old.copy_(new) if len(kinds) == 2 and kinds[0] == kinds[1] else new.clone()


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


def _how(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The layer as a function of x, weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, TensorFlowConv2d):
        return lambda x, weight, bias: layer._conv_forward(layer.padded(x), weight, bias)
    return layer._conv_forward
