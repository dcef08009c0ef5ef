"""Inner maximisation: projected gradient ascent inside the L-inf or L2 ball and the [0,1] box.

Used while training and, with a different loss and more steps, by the PGD attack of the evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Length of all steps together, as a multiple of eps, of the BCS authors' evaluation.
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
    """Compute no parameter gradients inside the block, whatever the code there asks for."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def uniform_start(x: Tensor, eps: float, generator: torch.Generator, norm: str = "Linf") -> Tensor:
    """x plus a perturbation drawn uniformly from the ball, clipped to [0,1]."""
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
    """Each image's change scaled to L2 length 1; where it is 0 it stays so."""
    lengths = change.flatten(1).norm(dim=1).clamp(min=1e-12)
    return change / lengths.view(-1, *[1] * (change.ndim - 1))


def _project(change: Tensor, eps: float) -> Tensor:
    """Each image's change, shortened to L2 length eps if it is longer."""
    lengths = change.flatten(1).norm(dim=1)
    return change * (eps / lengths.clamp(min=eps)).view(-1, *[1] * (change.ndim - 1))


def gaussian_start(x: Tensor, eps: float, generator: torch.Generator, norm: str = "Linf") -> Tensor:
    """x plus 0.001 * N(0, 1), the start of TRADES; the first projection brings it into the ball."""
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

    Args:
        x: clean images x_NCHW in [0,1], the centre of the ball.
        start: first iterate, same shape.
        loss: maps logits_NK to a scalar.
        eps: radius; step_size: length of all steps, or of each; in pixel units and the norm.
        norm: "Linf" or "L2".

    Returns:
        Images in [0,1] within eps of x, detached; of no images none. Parameter gradients are
        neither computed nor touched.

    Source: Madry et al., ICLR 2018, section 2.1.
    """
    if len(x) == 0:  # which not every layer can be given
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
    """The sum over images of the cross entropy with labels y_N."""
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def divergence_from(clean_logits: Tensor) -> Loss:
    """The sum over images of KL(clean || perturbed)."""
    target = F.softmax(clean_logits.detach(), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")
