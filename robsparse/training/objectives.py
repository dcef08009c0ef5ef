"""Training objectives. Each one returns the loss of a batch as a scalar with gradients.

An objective is called with a model in train mode. Crafting sets the mode to `Crafting.bn_mode`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.compute.machine import computing, pick_precision
from robsparse.fast import folding, sparse_pass
from robsparse.schema.threat import Crafting
from robsparse.schema.training import Training
from robsparse.study.planned import PlannedCell

# (x, eps, generator, norm) -> first iterate
RandomStart = Callable[[Tensor, float, torch.Generator, str], Tensor]


@dataclass(frozen=True)
class Attacker:
    """Crafts training examples under the threat of the study, with a separate generator.

    eps, norm: radius and norm of the threat. crafting: steps, step size and the like.
    precision: the precision of the passes: fp32, tf32 or bf16.
    scale: factor in (0, 1] on eps and step_size, for a warm-up.
    crafted_on: what the passes used so far: "view", "network" or both.
    """

    eps: float
    crafting: Crafting
    generator: torch.Generator
    norm: str = "Linf"
    precision: str = "fp32"
    scale: float = 1.0
    crafted_on: set[str] = field(default_factory=set, compare=False)

    def scaled(self, scale: float) -> "Attacker":
        """Return an attacker with smaller eps and step_size and the same generator."""
        return replace(self, scale=scale)

    def attack_labels(
        self, model: nn.Module, x: Tensor, y: Tensor, start: RandomStart = perturb.uniform_start
    ) -> Tensor:
        """Return images that increase the cross entropy with y_N, from a random `start`."""
        return self._craft(model, x, start, perturb.cross_entropy_of(y))

    def attack_outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return images that increase the KL divergence from the clean output.

        The start is x + 0.001 N(0,1).
        """
        with self._view(model, x) as view, torch.no_grad():
            clean_logits = view(x)
        return self._craft(model, x, perturb.gaussian_start, perturb.divergence_from(clean_logits))

    def _craft(self, model: nn.Module, x: Tensor, start: RandomStart, loss: perturb.Loss) -> Tensor:
        eps = self.scale * self.eps
        with self._view(model, x) as view:
            return perturb.ascend(
                view,
                x,
                start(x, eps, self.generator, self.norm),
                loss,
                eps=eps,
                step_size=self.scale * self.crafting.step_size,
                steps=self.crafting.steps,
                norm=self.norm,
            )

    @contextmanager
    def _view(self, model: nn.Module, x: Tensor) -> Iterator[nn.Module]:
        """Yield the folded view for crafting, or the network if batch norm is in train mode."""
        with perturb.batch_norm_mode(model, self.crafting.bn_mode):
            view, precision = model, self.precision
            if self.crafting.bn_mode == "eval":
                dtype = torch.bfloat16 if precision == "bf16" else None
                view = folding.folded_view(model, x, dtype, self.crafting.backend)
            if view is not model and precision == "bf16":
                precision = (
                    "fp32"  # the weights of the view are bf16; autocast would also round its logits
                )
            own = nullcontext() if view is model else sparse_pass.paused()
            with computing(precision, x.device), own:
                yield view
            if len(x):
                self.crafted_on.add(folding.runs_on(view))


# (model, x_NCHW, y_N, attacker) -> loss of the batch
Objective = Callable[[nn.Module, Tensor, Tensor, Attacker], Tensor]


def make_attacker(planned: PlannedCell, generator: torch.Generator) -> Attacker:
    """Return the attacker for the training of a cell, on the device of the generator."""
    crafting, threat = planned.crafting, planned.training_threat
    precision = pick_precision(crafting.precision, generator.device)
    return Attacker(threat.eps, crafting, generator, threat.norm, precision)


def smoothed_cross_entropy(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross entropy with a target of 1 - smoothing for the label.

    The target of each of the K - 1 other classes is smoothing / (K - 1). PyTorch distributes its
    `label_smoothing` over all K classes, so it gets smoothing * K / (K - 1).

    Source: Szegedy et al., CVPR 2016. The targets are those in the code of Pang et al., ICLR 2021,
    who also smooth the labels of adversarial training and do not smooth those of crafting.
    """
    classes = logits.shape[1]
    return F.cross_entropy(logits, y, label_smoothing=smoothing * classes / max(1, classes - 1))


def natural(
    model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float, *, smoothing: float = 0
) -> Tensor:
    """Cross entropy on clean images."""
    return smoothed_cross_entropy(model(x), y, smoothing)


def at(
    model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float, *, smoothing: float = 0
) -> Tensor:
    """Cross entropy on PGD images only. Source: Madry et al., ICLR 2018, equation 2.1."""
    return smoothed_cross_entropy(model(attacker.attack_labels(model, x, y)), y, smoothing)


def mat(
    model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float, *, smoothing: float = 0
) -> Tensor:
    """Mixed-batch adversarial training: the first half of the batch is attacked.

    If the number of images is odd, the clean part is larger, so a single image stays clean. Both
    parts form one batch for batch norm. All images have the same weight in the mean.

    Source: Kurakin et al., ICLR 2017, section 3; the halves as in the code of the BCS authors.
    """
    half = len(x) // 2
    adversarial = attacker.attack_labels(model, x[:half], y[:half])
    return smoothed_cross_entropy(model(torch.cat([adversarial, x[half:]])), y, smoothing)


def trades(
    model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float, *, smoothing: float = 0
) -> Tensor:
    """Clean cross entropy + beta * mean KL(clean || adversarial).

    The gradient flows through both branches. Each branch is a separate batch for batch norm.
    Label smoothing changes only the clean cross entropy, as in Rebuffi et al., NeurIPS 2021.
    Robust self-training (rst) uses the same loss on labelled and pseudo-labelled images.

    Source: Zhang et al., ICML 2019, equation 5; yaodongyu/TRADES for the start of the attack;
    Carmon et al., NeurIPS 2019, for self-training.
    """
    adversarial = attacker.attack_outputs(model, x)
    clean_logits, adversarial_logits = model(x), model(adversarial)
    divergence = F.kl_div(
        F.log_softmax(adversarial_logits, dim=1),
        F.softmax(clean_logits, dim=1),
        reduction="batchmean",
    )
    return smoothed_cross_entropy(clean_logits, y, smoothing) + beta * divergence


def mart(model: nn.Module, x: Tensor, y: Tensor, attacker: Attacker, beta: float) -> Tensor:
    """Boosted cross entropy + beta * mean of KL(clean || adversarial) * (1 - p_y(clean)).

    The boosted cross entropy is -log p_y - log(1.0001 - max over k != y of p_k), where p are the
    adversarial probabilities. It also reduces the probability of the most likely wrong class.
    The images maximise the cross entropy from x + 0.001 N(0,1).

    Source: Wang et al., ICLR 2020, equations 8 to 11. The constants 1e-12, 1.0001 and 1.0000001 are
    not in the paper. They are in YisenWang/MART and keep logarithms and weights away from 0.
    """
    adversarial = attacker.attack_labels(model, x, y, perturb.gaussian_start)
    clean_logits, adversarial_logits = model(x), model(adversarial)
    label = F.one_hot(y, adversarial_logits.shape[1]).bool()
    p = F.softmax(adversarial_logits, dim=1)
    likeliest_wrong = p.masked_fill(label, 0.0).amax(dim=1)
    log_not_wrong = (1.0001 - likeliest_wrong + 1e-12).log()
    boosted = F.cross_entropy(adversarial_logits, y) - log_not_wrong.mean()
    clean = F.softmax(clean_logits, dim=1)
    divergence = F.kl_div((p + 1e-12).log(), clean, reduction="none")
    return boosted + beta * (divergence.sum(dim=1) * (1.0000001 - clean[label])).mean()


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "natural": natural,
    "at": at,
    "mat": mat,
    "trades": trades,
    "mart": mart,
    "rst": trades,
}


def make_objective(name: str, training: Training) -> Objective:
    """Return the objective with this name, with beta and label smoothing of the settings."""
    function, beta = OBJECTIVES[name], training.beta
    smoothing = {"smoothing": training.label_smoothing} if training.label_smoothing else {}
    return lambda model, x, y, attacker: function(model, x, y, attacker, beta, **smoothing)
