"""Inner maximisation: projected gradient ascent inside the L-inf ball and the [0,1] box.

Used while training and, with a different loss and more steps, by the PGD attack of the evaluation.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
def frozen(model: nn.Module) -> Iterator[None]:
    """Compute no parameter gradients inside the block, whatever the code there asks for."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def uniform_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """x plus uniform noise in [-eps, eps], clipped to [0,1]."""
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + eps * (2 * noise - 1)).clamp(0, 1)


def gaussian_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """x plus 0.001 * N(0, 1), the start of TRADES; eps is not used, the first projection is."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + 0.001 * noise


def ascend(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    loss: Loss,
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Maximise `loss` of the logits by `steps` signed gradient steps.

    Args:
        x: clean images x_NCHW in [0,1], the centre of the ball.
        start: first iterate, same shape.
        loss: maps logits_NK to a scalar.
        eps: L-inf radius; step_size: length of each step, both in pixel units.

    Returns:
        Images in [0,1] within eps of x, detached. Parameter gradients are neither computed
        nor touched.

    Source: Madry et al., ICLR 2018, section 2.1.
    """
    adversarial = start.detach()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(model(adversarial)), adversarial)
        with torch.no_grad():
            adversarial = adversarial + step_size * gradient.sign()
            adversarial = torch.minimum(torch.maximum(adversarial, x - eps), x + eps).clamp_(0, 1)
    return adversarial.detach()


def cross_entropy_of(y: Tensor) -> Loss:
    """The sum over images of the cross entropy with labels y_N."""
    return lambda logits: F.cross_entropy(logits, y, reduction="sum")


def divergence_from(clean_logits: Tensor) -> Loss:
    """The sum over images of KL(clean || perturbed)."""
    target = F.softmax(clean_logits.detach(), dim=1)
    return lambda logits: F.kl_div(F.log_softmax(logits, dim=1), target, reduction="sum")
