"""How a program runs: as it is, compiled by torch, or replayed as a CUDA graph.

All give the same values to rounding: each is compared with `eager` on the first images. What fails
to start, or differs, is replaced by `eager`, and one line says so.
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
    """One way to run a program: (snapshot, x_NCHW) -> logits_NK.

    name: eager; compiled (torch.compile: needs a C++ compiler and takes a minute to start, which
    only long runs win back); graph (a CUDA graph for every shape of batch: saves the launches of
    small kernels); auto (eager: the fastest where measured, see docs/speed.md).
    """

    def __init__(self, name: str, eager: Run) -> None:
        self.name, self.eager = name, eager
        # By the kind of images and precision, each started with the first images of its kind.
        self.started: dict[tuple[object, ...], Run] = {}

    def __call__(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The logits."""
        if self.name in ("auto", "eager"):
            return self.eager(snapshot, x)
        kind = (x.shape, x.dtype, x.stride(), x.requires_grad, snapshot.dtype)
        if kind in self.started:
            return self.started[kind](snapshot, x)
        try:
            run = _START[self.name](self.eager, snapshot, x)
            self._require_same(run, snapshot, x)
            out = run(snapshot, x)
        except Exception as error:  # compilers and drivers can raise anything
            if is_out_of_memory(error):
                raise
            reason = one_line(error)
            print(
                f"crafting: backend '{self.name}' does not run here ({reason}); eager", flush=True
            )
            self.name = "eager"
            return self.eager(snapshot, x)
        self.started[kind] = run
        return out

    def _require_same(self, run: Run, snapshot: Snapshot, x: Tensor) -> None:
        """Raise RuntimeError when `run` computes something else than `eager` does."""
        plain, fast = (
            proof.passes(functools.partial(way, snapshot), x, gradient=x.requires_grad)
            for way in (self.eager, run)
        )
        if reason := proof.difference(plain, fast, snapshot.dtype):
            raise RuntimeError(f"it computes something else: {reason}")


def _compiled(eager: Run, snapshot: Snapshot, x: Tensor) -> Run:
    return torch.compile(eager, dynamic=False)


class _Graph:
    """Forward and backward pass as a CUDA graph.

    The graph reads and writes fixed memory: images and results are copied on the way in and out,
    weights when it first runs a snapshot. loaded: the snapshot whose weights it has now.
    """

    def __init__(self, eager: Run, snapshot: Snapshot, x: Tensor) -> None:
        if not x.is_cuda:
            raise RuntimeError("there are CUDA graphs on CUDA devices alone")
        self.memory = snapshot.clone()
        self.loaded = weakref.ref(snapshot)
        sample = x.detach().clone().requires_grad_(x.requires_grad)
        # A module would have its own forward replaced; what wraps it has not.
        run = functools.partial(eager, self.memory)
        graph = torch.cuda.make_graphed_callables(run, (sample,))
        self.graph = cast(Callable[[Tensor], Tensor], graph)

    def __call__(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if self.loaded() is not snapshot:
            for mine, new in zip(self.memory.tensors(), snapshot.tensors(), strict=True):
                mine.copy_(new)
            self.loaded = weakref.ref(snapshot)
        # Multiplying by 1 makes the gradient that is handed out a copy, as clone does the logits.
        return self.graph(x * 1.0).clone()


_START: dict[str, Callable[[Run, Snapshot, Tensor], Run]] = {"compiled": _compiled, "graph": _Graph}
