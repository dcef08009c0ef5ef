"""Training objectives: each returns the loss of one batch as a scalar that carries gradients.

The model is in train mode when an objective is called; crafting switches it by `Crafting.bn_mode`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse import perturb
from robsparse.config import Crafting, Study


@dataclass(frozen=True)
class Attacker:
    """Crafts training examples under the threat of the study with its own random numbers."""

    eps: float
    crafting: Crafting
    generator: torch.Generator

    def attack_labels(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Maximise the cross entropy with y_N from a uniform random start."""
        start = perturb.uniform_start(x, self.eps, self.generator)
        return self._craft(model, x, start, perturb.cross_entropy_of(y))

    def attack_outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """Maximise the KL divergence from the model's own clean output, from x + 0.001 N(0,1)."""
        with torch.no_grad(), perturb.batch_norm_mode(model, self.crafting.bn_mode):
            clean_logits = model(x)
        start = perturb.gaussian_start(x, self.eps, self.generator)
        return self._craft(model, x, start, perturb.divergence_from(clean_logits))

    def _craft(self, model: nn.Module, x: Tensor, start: Tensor, loss: perturb.Loss) -> Tensor:
        with perturb.batch_norm_mode(model, self.crafting.bn_mode):
            return perturb.ascend(
                model,
                x,
                start,
                loss,
                eps=self.eps,
                step_size=self.crafting.step_size,
                steps=self.crafting.steps,
            )


def natural(model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float) -> Tensor:
    """Cross entropy on clean images."""
    return F.cross_entropy(model(x), y)


def at(model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float) -> Tensor:
    """Cross entropy on PGD images alone. Source: Madry et al., ICLR 2018, equation 2.1."""
    return F.cross_entropy(model(attacker.attack_labels(model, x, y)), y)


def trades(model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float) -> Tensor:
    """Clean cross entropy + beta * mean KL(clean || adversarial).

    The gradient flows through both branches, each of which is a batch of its own for batch norm.
    Source: Zhang et al., ICML 2019, equation 5; yaodongyu/TRADES for the start of the attack.
    """
    adversarial = attacker.attack_outputs(model, x)
    clean_logits, adversarial_logits = model(x), model(adversarial)
    divergence = F.kl_div(
        F.log_softmax(adversarial_logits, dim=1),
        F.softmax(clean_logits, dim=1),
        reduction="batchmean",
    )
    return F.cross_entropy(clean_logits, y) + beta * divergence


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"natural": natural, "at": at, "trades": trades}

# Forward and backward passes over a batch that one step of each objective costs.
PASSES: dict[str, Callable[[int], tuple[int, int]]] = {
    "natural": lambda steps: (1, 1),
    "at": lambda steps: (steps + 1, steps + 1),
    "trades": lambda steps: (steps + 3, steps + 2),
}


def of_study(study: Study, name: str) -> Callable[[nn.Module, Tensor, Tensor, Attacker], Tensor]:
    """The named objective with the study's beta filled in."""
    function, beta = OBJECTIVES[name], study.training.beta
    return lambda model, x, y, attacker: function(model, x, y, attacker, beta)
