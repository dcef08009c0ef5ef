"""Fast minimum norm: the smallest perturbation that breaks each image, so that one run gives robust
accuracy at every eps.

Source: Pintor et al., NeurIPS 2021, through the package foolbox (LInfFMNAttack, L2FMNAttack).
"""

import os
from typing import Any

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from robsparse import perturb
from robsparse.attacks import AttackThreat, Outcome, Progress, in_batches, length
from robsparse.config import Reach

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox wants a git, which is not used here
import foolbox

LABEL = "FMN"
GIVES_DISTANCES = True


class Params(Reach):
    """steps: gradient steps; max_stepsize: L2 length of the first; gamma: share by which the
    allowed perturbation changes at first. The defaults are the package's.
    """

    steps: PositiveInt = 100
    max_stepsize: PositiveFloat = 1.0
    gamma: PositiveFloat = 0.05


def passes(params: Params) -> tuple[int, int]:
    """Forward-and-backward passes and forward-only passes over an image."""
    return params.steps, 1


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, threat: AttackThreat
) -> Outcome:
    """How far each image has to be moved; it is robust if that is further than eps."""
    kind = foolbox.attacks.LInfFMNAttack if threat.norm == "Linf" else _L2
    attack = kind(steps=params.steps, max_stepsize=params.max_stepsize, gamma=params.gamma)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=threat.device)
    distances = torch.full((len(y_N),), torch.inf)
    progress = Progress("FMN", len(y_N), threat.report)

    def work(where: slice) -> None:
        x, y = x_NCHW[where].to(threat.device), y_N[where].to(threat.device)
        found = attack.run(wrapped, x, foolbox.criteria.Misclassification(y))
        with torch.no_grad():
            broken = (model(found).argmax(1) != y).cpu()
        distances[where] = length(found - x, threat.norm).cpu().where(broken, torch.inf)
        progress.update(where.stop, int((distances > threat.eps).sum()))

    with perturb.frozen(model):
        in_batches(len(y_N), threat.batch_size, work, threat.report)
    robust = distances > threat.eps
    progress.close(int(robust.sum()), len(y_N))
    return Outcome(
        {"all": robust},
        {"steps": params.steps, "restarts": 1},
        max_perturbation=float(distances[~robust].max()) if len(distances[~robust]) else 0.0,
        distances=distances,
    )


class _L2(foolbox.attacks.L2FMNAttack):
    """The package's attack with its projection mended: it divides lengths by themselves (3.3.4), so
    that nothing is ever projected and perturbations stay as long as they first were.
    """

    def project(self, x: Any, x0: Any, epsilon: Any) -> Any:
        change = x.raw - x0.raw
        lengths = length(change, "L2").clamp(min=1e-12)
        factor = (epsilon.raw / lengths).clamp(max=1)
        return type(x)(x0.raw + change * factor.view(-1, *[1] * (change.ndim - 1)))
