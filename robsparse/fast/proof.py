"""Whether two ways to compute the same agree: outputs and the gradient of the input.

A fast path is compared with the plain one on real images before it is used: the folded view with
its network, a matrix of `small_maps` with its convolution, a backend with eager execution.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]

IMAGES = 8  # compared; what they cost is nothing beside a step of training

# Largest difference that rounding explains: of outputs in units of the largest output, of gradients
# as lengths. Measured over all architectures, with random and with trained weights, outputs differ
# by at most 1e-5 in single and 1e-13 in double precision. Gradients differ by more, because a ReLU
# whose input rounds to the other side of 0 opens on one path alone.
LIMITS = {
    torch.float64: (1e-9, 1e-6),
    torch.float32: (1e-4, 5e-2),
    torch.bfloat16: (0.1, 0.9),
}


class Passes(NamedTuple):
    """What passes over some images give; the gradient is None where none was asked for."""

    outputs: Tensor
    gradient: Tensor | None


def passes(run: Run, x: Tensor, *, gradient: bool) -> Passes:
    """One pass over x (images first), with the gradient of a fixed sum of outputs or without one.

    No gradient of a weight is computed, and x stays as it is.
    """
    images = x.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        outputs = run(images)
        if not gradient:
            return Passes(outputs, None)
        flat = outputs.flatten(1)
        weights = torch.linspace(-1.0, 1.5, flat.shape[1], dtype=flat.dtype, device=flat.device)
        (slope,) = torch.autograd.grad((flat * weights).sum(), images)
    return Passes(outputs.detach(), slope)


def difference(plain: Passes, fast: Passes, dtype: torch.dtype | None = None) -> str:
    """What differs by more than rounding, in words; "" if nothing does. Not a number differs.

    dtype: what the passes computed in, if that is not the type of the outputs.
    """
    outputs, gradients = LIMITS.get(dtype or plain.outputs.dtype, (0.0, 0.0))
    if plain.outputs.shape != fast.outputs.shape:
        return f"outputs of shape {tuple(fast.outputs.shape)}, not {tuple(plain.outputs.shape)}"
    if not plain.outputs.numel():
        return ""
    apart = float((plain.outputs - fast.outputs).abs().max())
    scale = float(plain.outputs.abs().max())
    if not apart <= outputs * scale:
        return f"outputs differ by {apart:.2g}, where the largest is {scale:.2g}"
    if plain.gradient is None or fast.gradient is None:
        return ""
    apart, scale = (float(g.norm()) for g in (plain.gradient - fast.gradient, plain.gradient))
    if not apart <= gradients * scale:
        return f"gradients differ by {apart:.2g}, where their length is {scale:.2g}"
    return ""
