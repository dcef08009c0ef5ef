"""How a frozen view runs: as it is, compiled by torch, or replayed as a CUDA graph.

All give the same values to rounding: each is compared with `eager` on the first images. What fails
to start, or differs, falls back to `eager` with one line.
"""

import functools

import torch
from torch import Tensor

from robsparse.compute.machine import is_out_of_memory
from robsparse.fast import proof
from robsparse.fast.proof import Run


class Backend:
    """One way to run a view: x_NCHW -> logits_NK.

    name: eager; compiled (torch.compile: needs a C++ compiler, and its minute pays in long runs
    alone); graph (a CUDA graph for every shape of batch: saves the launches of small kernels);
    auto (eager: the fastest where measured, see docs/speed.md).
    """

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.eager = name, run
        self.started: dict[tuple, Run] = {}

    def __call__(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The logits; dtype: what is computed in, if that is not the type of x."""
        if self.name in ("auto", "eager"):
            return self.eager(x)
        kind = (x.shape, x.dtype, x.stride(), x.requires_grad, dtype)
        if kind in self.started:
            return self.started[kind](x)
        try:
            run = _START[self.name](self.eager, x)
            _require_same(self.eager, run, x, dtype)
            out = run(x)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # whatever compilers and drivers come up with
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(
                f"crafting: backend '{self.name}' does not run here ({reason}); eager", flush=True
            )
            self.name = "eager"
            return self.eager(x)
        self.started[kind] = run
        return out


def _require_same(eager: Run, run: Run, x: Tensor, dtype: torch.dtype | None) -> None:
    """Raise RuntimeError when `run` computes something else than `eager` does."""
    plain, fast = (proof.passes(way, x, gradient=x.requires_grad) for way in (eager, run))
    if said := proof.difference(plain, fast, dtype):
        raise RuntimeError(f"it computes something else: {said}")


def _compiled(eager: Run, x: Tensor) -> Run:
    return torch.compile(eager, dynamic=False)


def _graphed(eager: Run, x: Tensor) -> Run:
    """Capture forward and backward; both read and write fixed memory, which is copied out of."""
    if not x.is_cuda:
        raise RuntimeError("there are CUDA graphs on CUDA devices alone")
    sample = x.detach().clone().requires_grad_(x.requires_grad)
    # A module would have its own forward replaced; what wraps it has not.
    graph = torch.cuda.make_graphed_callables(functools.partial(eager), (sample,))
    # Multiplying by 1 makes the gradient that is handed out a copy, as clone does the logits.
    return lambda images: graph(images * 1.0).clone()


_START = {"compiled": _compiled, "graph": _graphed}
