"""Comparison of a fast path with the plain path: outputs and gradients of the input.

Every fast path is compared on real images before it is used: the folded view with its network, a
form of a convolution with that of torch, and a backend with eager execution.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]

IMAGES = 8  # number of compared images; this costs little compared with a training step

# The largest differences that rounding can explain, of outputs and of gradients. Outputs are
# relative to the largest output, gradients to their L2 length. For all architectures, with random
# and with trained weights, outputs differed by at most 1e-5 in single precision and by 1e-13 in
# double precision. Gradients differ more: if the input of a ReLU is rounded to the other side of 0,
# the gradient passes only on one path.
LIMITS = {
    torch.float64: (1e-9, 1e-6),
    torch.float32: (1e-4, 5e-2),
    torch.bfloat16: (0.1, 0.9),
}


class Passes(NamedTuple):
    """The results of a pass over some images. The gradient is None if it was not requested."""

    outputs: Tensor
    gradient: Tensor | None


def passes(run: Run, x: Tensor, *, gradient: bool) -> Passes:
    """Return the results of one pass over x (first axis: images).

    The gradient is that of a fixed weighted sum of the outputs. No gradient of a weight is
    computed, and x is not changed.
    """
    images = x.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        outputs = run(images)
        if not gradient:
            return Passes(outputs, None)
        (slope,) = torch.autograd.grad((outputs * slopes_of(outputs)).sum(), images)
    return Passes(outputs.detach(), slope)


def slopes_of(outputs: Tensor) -> Tensor:
    """Return the gradient of the weighted sum of `passes`: the weights of the outputs."""
    count, kind, device = outputs[0].numel(), outputs.dtype, outputs.device
    weights = torch.linspace(-1.0, 1.5, count, dtype=kind, device=device)
    return weights.view_as(outputs[0]).expand_as(outputs)


def difference(plain: Passes, fast: Passes, dtype: torch.dtype | None = None) -> str:
    """Return a text about a difference larger than rounding, or "". NaN always differs.

    dtype: the precision of the passes, if it is not the type of the outputs.
    """
    outputs, gradients = LIMITS.get(dtype or plain.outputs.dtype, (0.0, 0.0))
    if plain.outputs.shape != fast.outputs.shape:
        return f"outputs of shape {tuple(fast.outputs.shape)}, not {tuple(plain.outputs.shape)}"
    if not plain.outputs.numel():
        return ""
    apart = float((plain.outputs - fast.outputs).abs().max())
    scale = float(plain.outputs.abs().max())
    if not apart <= outputs * scale:
        return f"outputs differ by {apart:.2g}; the largest is {scale:.2g}"
    if plain.gradient is None or fast.gradient is None:
        return ""
    apart, scale = (float(g.norm()) for g in (plain.gradient - fast.gradient, plain.gradient))
    if not apart <= gradients * scale:
        return f"gradients differ by {apart:.2g}; their length is {scale:.2g}"
    return ""
