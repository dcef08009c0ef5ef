"""Backends that run a program: eager, compiled by torch, or as a CUDA graph.

All backends give the same values up to rounding. Each one is compared with `eager` on the first
images. A backend that fails or differs is replaced by `eager`, and a line reports it.
"""

import functools
import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from robsparse.base.errors import one_line
from robsparse.compute.machine import is_out_of_memory
from robsparse.fast import proof
from robsparse.fast.folded_layers import Snapshot

Run = Callable[[Snapshot, Tensor], Tensor]  # snapshot, x_NCHW -> logits_NK


class Backend:
    """Runs a program: (snapshot, x_NCHW) -> logits_NK.

    name:
        eager: plain PyTorch.
        compiled: torch.compile. It needs a C++ compiler and a minute to start, so it is faster only
            in long runs.
        graph: a CUDA graph for every batch shape. It saves the launch times of small kernels.
        auto: eager, which was the fastest in the measurements (docs/speed.md).
    """

    def __init__(self, name: str, eager: Run, graph: Run) -> None:
        """eager: runs the program in the fastest way. graph: its graph of torch operations."""
        self.name, self.eager, self.graph = name, eager, graph
        # By kind of images and precision. Each one starts with the first images of its kind.
        self.started: dict[tuple[object, ...], Run] = {}

    def __call__(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """Return the logits."""
        if self.name in ("auto", "eager"):
            return self.eager(snapshot, x)
        kind = (x.shape, x.dtype, x.stride(), x.requires_grad, snapshot.dtype)
        if kind in self.started:
            return self.started[kind](snapshot, x)
        try:
            run = _START[self.name](self.graph, snapshot, x)
            self._require_same(run, snapshot, x)
            out = run(snapshot, x)
        except Exception as error:  # compilers and drivers can raise anything
            if is_out_of_memory(error):
                raise
            reason = one_line(error)
            print(
                f"crafting: backend '{self.name}' cannot be used ({reason}); using eager",
                flush=True,
            )
            self.name = "eager"
            return self.eager(snapshot, x)
        self.started[kind] = run
        return out

    def _require_same(self, run: Run, snapshot: Snapshot, x: Tensor) -> None:
        """Raise RuntimeError if the results of `run` and `eager` differ."""
        plain, fast = (
            proof.passes(functools.partial(way, snapshot), x, gradient=x.requires_grad)
            for way in (self.eager, run)
        )
        if reason := proof.difference(plain, fast, snapshot.dtype):
            raise RuntimeError(f"its results differ: {reason}")


def _compiled(eager: Run, snapshot: Snapshot, x: Tensor) -> Run:
    compiled = torch.compile(eager, dynamic=False)
    return lambda snapshot, x: compiled(snapshot.dense(), x)


class _Graph:
    """Forward and backward pass as a CUDA graph.

    The graph reads and writes fixed memory. Images and results are copied at every call. Weights
    are copied at the first call with a snapshot. `loaded` refers to the snapshot of these weights.
    """

    def __init__(self, eager: Run, snapshot: Snapshot, x: Tensor) -> None:
        if not x.is_cuda:
            raise RuntimeError("CUDA graphs need a CUDA device")
        self.memory = snapshot.clone()
        self.loaded = weakref.ref(snapshot)
        sample = x.detach().clone().requires_grad_(x.requires_grad)
        # torch would replace the forward of a module, but not that of a function around it.
        run = functools.partial(eager, self.memory)
        graph = torch.cuda.make_graphed_callables(run, (sample,))
        self.graph = cast(Callable[[Tensor], Tensor], graph)

    def __call__(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if self.loaded() is not snapshot:
            for own, new in zip(self.memory.tensors(), snapshot.tensors(), strict=True):
                own.copy_(new)
            self.loaded = weakref.ref(snapshot)
        # Multiplication by 1 makes a copy of the returned gradient, and clone one of the logits.
        return self.graph(x * 1.0).clone()


_START: dict[str, Callable[[Run, Snapshot, Tensor], Run]] = {"compiled": _compiled, "graph": _Graph}
