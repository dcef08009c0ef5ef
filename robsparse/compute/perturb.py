"""Inner maximisation: projected gradient ascent inside the L-inf or L2 ball and the [0,1] box.

Adversarial training uses it. The PGD attack of the evaluation uses it with another loss and more
steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Sum of the lengths of all steps in the BCS authors' evaluation, as a multiple of eps.
RELATIVE_STEP = 2.5

Loss = Callable[[Tensor], Tensor]  # logits_NK -> scalar to be maximised


@contextmanager
def batch_norm_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put the whole model in "eval" or "train" mode and restore every module's mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def no_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of parameters inside the block, even if its code asks for them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def uniform_start(x: Tensor, eps: float, generator: torch.Generator, norm: str = "Linf") -> Tensor:
    """Return x plus a perturbation that is drawn uniformly from the ball, clipped to [0,1]."""
    options: dict[str, Any] = {"generator": generator, "device": x.device, "dtype": x.dtype}
    if norm == "Linf":
        return (x + eps * (2 * torch.rand(x.shape, **options) - 1)).clamp(0, 1)
    direction = _unit(torch.randn(x.shape, **options))
    radius = torch.rand(len(x), **options) ** (1 / x[0].numel()) if len(x) else x.new_zeros(0)
    return (x + eps * radius.view(-1, *[1] * (x.ndim - 1)) * direction).clamp(0, 1)


def length(change_NCHW: Tensor, norm: str) -> Tensor:
    """Length of each perturbation in a norm, "Linf" or "L2" (float N)."""
    flat = change_NCHW.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def _unit(change: Tensor) -> Tensor:
    """Scale the change of each image to L2 length 1; a change of 0 stays 0."""
    lengths = change.flatten(1).norm(dim=1).clamp(min=1e-12)
    return change / lengths.view(-1, *[1] * (change.ndim - 1))


def _project(change: Tensor, eps: float) -> Tensor:
    """Shorten the change of each image to L2 length eps if it is longer."""
    lengths = change.flatten(1).norm(dim=1)
    return change * (eps / lengths.clamp(min=eps)).view(-1, *[1] * (change.ndim - 1))


def gaussian_start(x: Tensor, eps: float, generator: torch.Generator, norm: str = "Linf") -> Tensor:
    """Return x + 0.001 * N(0, 1), the start of TRADES.

    The result may lie outside the ball; the first projection corrects this.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + 0.001 * noise


def ascend(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    loss: Loss,
    *,
    eps: float,
    step_size: float | Sequence[float],
    steps: int,
    norm: str = "Linf",
) -> Tensor:
    """Maximise `loss` of the logits by `steps` steps of the signed or normalised gradient.

    Gradients of parameters are not computed and not changed.

    Args:
        model: maps images x_NCHW to logits_NK.
        x: clean images x_NCHW in [0,1], the centre of the ball. N may be 0.
        start: first iterate, same shape as x.
        loss: maps logits_NK to a scalar.
        eps: radius of the ball in `norm`, in pixel units.
        step_size: length of each step in `norm`, in pixel units; one value, or one for each step.
        steps: number of steps.
        norm: "Linf" or "L2".

    Returns:
        Images in [0,1] within eps of x, detached.

    Source: Madry et al., ICLR 2018, section 2.1.
    """
    if len(x) == 0:  # some layers fail on an empty batch
        return start.detach()
    sizes = [step_size] * steps if isinstance(step_size, float | int) else step_size
    low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    adversarial = start.detach()
    for step in sizes:
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model(adversarial)), adversarial)
        with torch.no_grad():
            if norm == "Linf":
                moved = torch.add(adversarial, gradient.sign_(), alpha=step)
                adversarial = torch.clamp(moved, low, high)
            else:
                moved = x + _project(adversarial + step * _unit(gradient) - x, eps)
                adversarial = moved.clamp_(0, 1)
    return adversarial.detach()


def cross_entropy_of(y: Tensor) -> Loss:
    """Return the loss: the sum over images of the cross entropy with labels y_N."""
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def divergence_from(clean_logits: Tensor) -> Loss:
    """Return the loss: the sum over images of KL(clean || perturbed)."""
    target = F.softmax(clean_logits.detach(), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")
