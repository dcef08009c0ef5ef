"""Batch norm in train mode on the kernels, with the sum of two maps and the ReLU after it.

If a ReLU follows a batch norm, directly or after the sum of a residual block, one call computes
both. A trace of the network tells where this is so: the result of the batch norm has no other use.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.fast.structure import hooked, hooks_on_all_modules, observed, structure
from robsparse.fast.tracing import rectified_norms
from robsparse.kernels.maps import images_innermost, is_innermost
from robsparse.kernels.norms import BatchNorm, Statistics

# The functions that the code of networks calls for a ReLU and for a sum.
_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_SUMS = (torch.add, Tensor.add, Tensor.add_)


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of batch norm in train mode. The names are those of `torch.nn.functional`."""

    x_NCHW: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def is_for_kernels(self) -> bool:
        """Return whether the kernels compute it: train mode, and images innermost in memory."""
        x_NCHW, lists = self.x_NCHW, (self.weight, self.bias)
        return (
            self.training
            and x_NCHW.ndim == 4
            and is_innermost(x_NCHW)
            and x_NCHW[:, :1].numel() > 1  # torch has an error for one number
            and x_NCHW.dtype in (torch.float32, torch.float64)
            and all(values is None or values.dtype == x_NCHW.dtype for values in lists)
        )

    def result(self, other: Tensor | None = None, *, rectified: bool = False) -> Tensor:
        """Return the result, and update the running statistics as torch does."""
        out, mean, variance = _Norm.apply(
            self.x_NCHW, other, self.weight, self.bias, self.eps, rectified
        )
        numbers = self.x_NCHW[:, 0].numel()
        unbiased = variance * (numbers / (numbers - 1))
        with torch.no_grad():
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                if running is not None:
                    kept = (1 - self.momentum) * running.double()
                    running.copy_(kept + self.momentum * new)
        return out


class _Norm(torch.autograd.Function):
    """x_NCHW, other map or None, weight, bias, eps, rectified -> result, mean, variance."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        x_NCHW, other, weight, bias, eps, rectified = given
        norm = BatchNorm(weight, bias, eps)
        out, found = norm.output(x_NCHW, other, rectified=rectified)
        gate = out if rectified and other is not None else None
        ctx.norm, ctx.rectified = norm, rectified
        ctx.save_for_backward(x_NCHW, gate, found.mean, found.variance)
        ctx.mark_non_differentiable(found.mean, found.variance)
        return out, found.mean, found.variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x_NCHW, gate, mean, variance = ctx.saved_tensors
        norm: BatchNorm = ctx.norm
        gradient, weight, bias, other = norm.gradients(
            x_NCHW, images_innermost(upstream.to(x_NCHW.dtype)), Statistics(mean, variance),
            rectified=ctx.rectified, gate=gate,
        )  # fmt: skip
        given = weight if norm.weight is not None else None, bias if norm.bias is not None else None
        return gradient, other, *given, None, None


class Norms:
    """Computes the batch norms of a network in train mode for a mode that sees its functions.

    waiting: the calls that are computed with the sum after them, by the identity of the tensor that
        the network has in the place of the result.
    rectified: the results for which the ReLU is already applied, by identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self.summed = _rectified_norms(model)
        self.waiting: dict[int, tuple[Tensor, _Call]] = {}
        self.rectified: dict[int, Tensor] = {}

    def computed(
        self, func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor | None:
        """Return the result of a function, or None if torch has to compute it."""
        if func in _RELUS and self.rectified:
            return self.rectified.pop(id((*args, *named.values())[0]), None)
        if func in _SUMS and self.waiting and len(args) == 2 and not named:
            return self._sum(*args)
        if func is F.batch_norm and (call := _Call(*args, **named)).is_for_kernels():
            return self._norm(call)
        return None

    def require_used(self) -> None:
        """Raise RuntimeError if a ReLU or a sum of the trace was left out."""
        if self.waiting or self.rectified:
            raise RuntimeError(
                "sparse training pass: a batch norm was used without the ReLU after it, because "
                "only a part of the network was called; set 'training.sparse_compute: off'"
            )

    def _norm(self, call: _Call) -> Tensor:
        summed = self.summed.get(id(call.running_mean))
        if not summed:
            return self._rectified(call, None) if summed is False else call.result()
        stand_in = call.x_NCHW.detach()
        self.waiting[id(stand_in)] = stand_in, call
        return stand_in

    def _sum(self, first: Any, second: Any) -> Tensor | None:
        """Return the sum with the ReLU after it, if one of the maps is a batch norm that waits."""
        entries = [self.waiting.pop(id(term), None) for term in (first, second)]
        if entries[0] is None:
            entries.reverse()
            first, second = second, first
        if entries[0] is None:
            return None
        call, other = entries[0][1], second if entries[1] is None else entries[1][1].result()
        if other.shape != call.x_NCHW.shape or other.dtype != call.x_NCHW.dtype:
            return call.result() + other
        return self._rectified(call, images_innermost(other))

    def _rectified(self, call: _Call, other: Tensor | None) -> Tensor:
        result = call.result(other, rectified=True)
        self.rectified[id(result)] = result
        return result


_Trace = tuple[list[tuple[object, ...]], dict[str, bool]]  # structure, and result of the trace
_TRACES: "weakref.WeakKeyDictionary[nn.Module, _Trace]" = weakref.WeakKeyDictionary()


def _rectified_norms(model: nn.Module) -> dict[int, bool]:
    """Return the result of `rectified_norms` by the identity of the running means.

    It is empty for a network with hooks on its layers, random numbers or other effects of a trace.
    """
    now = structure(model)
    if model not in _TRACES or _TRACES[model][0] != now:
        found: dict[str, bool] = {}
        layers = (module for module in model.modules() if module is not model)
        if not (hooks_on_all_modules() or any(map(hooked, layers))):
            with observed(model, torch.device("cpu")) as seen:
                found = rectified_norms(model)
                found = {} if seen.changed() else found
        _TRACES[model] = now, found
    names = _TRACES[model][1]
    means = ((model.get_submodule(name).running_mean, summed) for name, summed in names.items())
    return {id(mean): summed for mean, summed in means if mean is not None}
