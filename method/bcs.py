"""Bayesian connectivity sampling (BCS): robust training that is sparse from first to last step.

Each prunable weight is w = s * theta where theta > 0 and exactly 0 elsewhere (dormant); the sign s
is fixed. A step of SGD on the robust loss moves the live theta, a little noise is added to them,
and those that cross zero die; the same number is regrown at random dormant positions, so that the
number of live weights is constant. This samples from a posterior over connectivities and weights
whose prior allows no more than that number (DEEP R, Bellec et al., ICLR 2018, with the global
constraint).

Source: the ICML 2021 paper's published code, IGITUGraz/SparseAdversarialTraining, behaviour of
models/layers.py and run_connectivity_sampling.py; the order of a step is theirs.

Differs from the authors' code, unless `init: authors`:
- the initial live count is exactly the budget, with Erdos-Renyi-Kernel shares of the layers
  (theirs: fixed shares of each layer, which fall short of the budget or exceed it);
- a dormant theta stays dormant until it is drawn (theirs can drift back over zero when noise killed
  it against its momentum, and so exceed the budget).
In either case a layer never gets more regrowths than it has dormant positions; the remainder is
drawn again over the others (theirs stops with a shape error).
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.config import Fit, Strict
from robsparse.counts import density, keep_count
from robsparse.sparsity import erk_keep_counts, prunable
from robsparse.stages import Run, Stage

LABEL = "BCS"


class Train(Fit):
    """The authors' schedule: 200 epochs, lr 0.1 dropping by 10 at 50 % and 75 %, SGDW 5e-4."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.1
    schedule: Literal["constant", "cosine", "step"] = "step"
    weight_decay: float = Field(5e-4, ge=0)
    decay: Literal["coupled", "sgdw"] = "sgdw"


class Params(Strict):
    """Hyperparameters; the defaults are the authors', except for `init`."""

    train: Train = Train()
    init: Literal["strict", "authors"] = Field(
        "strict",
        description="strict: exactly the budget at every step; authors: their layer shares",
    )
    noise_scale: float = Field(1e-6, ge=0, description="noise on live theta is lr * scale * N(0,1)")
    regrown_theta: PositiveFloat = Field(1e-12, description="value of a regrown theta")
    momentum: Literal["keep", "reset"] = Field(
        "keep",
        description="velocity of a regrown theta: keep the stale one (authors) or reset to 0",
    )


class SignedTheta(nn.Module):
    """Parametrisation theta -> sign * theta where theta > 0, else exactly 0."""

    def __init__(self, sign: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", sign)

    def forward(self, theta: Tensor) -> Tensor:
        return self.sign * torch.relu(theta)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs()


class SamplingStage(Stage):
    """The one stage of BCS: SGD on theta, noise, rewiring."""

    name = "train"

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params
        self.live: list[Tensor] = []

    def before_fit(self, run: Run) -> None:
        counts = initial_counts(run.model, run.sparsity, self.params.init)
        for name, module in prunable(run.model).items():
            weight = module.weight.detach()
            sign = torch.where(weight < 0, -1.0, 1.0)
            parametrize.register_parametrization(module, "weight", SignedTheta(sign))
            order = torch.randperm(weight.numel(), generator=run.generator, device=weight.device)
            theta = module.parametrizations.weight.original.data
            theta.view(-1)[order[counts[name] :]] = 0.0

    def before_step(self, run: Run) -> None:
        self.live = [theta > 0 for theta in thetas(run.model)]

    def after_step(self, run: Run) -> None:
        with torch.no_grad():
            everything = thetas(run.model)
            for theta, live in zip(everything, self.live, strict=True):
                self._move(theta, live, run)
            deaths = sum(
                int((live & (theta <= 0)).sum())
                for theta, live in zip(everything, self.live, strict=True)
            )
            regrown = self._rewire(everything, run)
        run.logged |= {"deaths": deaths, "regrown": regrown}

    def _move(self, theta: Tensor, live: Tensor, run: Run) -> None:
        """Add noise to the live theta; in strict mode keep the dormant ones at or below zero."""
        if self.params.noise_scale:
            noise = torch.randn(theta.shape, generator=run.generator, device=theta.device)
            theta.add_(noise * live, alpha=run.lr * self.params.noise_scale)
        if self.params.init == "strict":
            theta.copy_(torch.where(live, theta, theta.clamp(max=0)))

    def _rewire(self, everything: list[Tensor], run: Run) -> int:
        """Bring the live count back to the budget; returns the number of regrown weights.

        Layers are drawn with probability proportional to their size, positions uniformly among
        the dormant ones of a layer.
        """
        sizes = torch.tensor([theta.numel() for theta in everything])
        dormant = [(theta <= 0).flatten().nonzero().squeeze(1) for theta in everything]
        room = torch.tensor([len(positions) for positions in dormant])
        budget = keep_count(int(sizes.sum()), run.sparsity)
        deficit = budget - int(sizes.sum() - room.sum())
        if deficit <= 0:
            return 0
        drawn = draw_layers(deficit, sizes, room, run.generator)
        for theta, positions, count in zip(everything, dormant, drawn.tolist(), strict=True):
            order = torch.randperm(len(positions), generator=run.generator, device=theta.device)
            picked = positions[order[:count]]
            theta.view(-1)[picked] = self.params.regrown_theta
            if self.params.momentum == "reset":
                velocity = run.optimizer.state[theta].get("momentum_buffer")
                if velocity is not None:
                    velocity.view(-1)[picked] = 0.0
        return deficit


def thetas(model: nn.Module) -> list[Tensor]:
    """The trainable theta of each prunable layer."""
    return [module.parametrizations.weight.original for module in prunable(model).values()]


def initial_counts(model: nn.Module, sparsity: float, init: str) -> dict[str, int]:
    """Live weights of each layer before the first step.

    strict: Erdos-Renyi-Kernel shares that sum to the budget, which leaves no layer starved.
    authors: 0.6 of the first and of the last layer, half the target density of all others; the
    first rewiring tops the sum up to the budget, an excess stays until enough weights die.
    """
    if init == "strict":
        return erk_keep_counts(model, sparsity)
    sizes = {name: module.weight.numel() for name, module in prunable(model).items()}
    names = list(sizes)
    ends = (names[0], names[-1])
    return {
        name: int((0.6 if name in ends else 0.5 * density(sparsity)) * size)
        for name, size in sizes.items()
    }


def draw_layers(count: int, sizes: Tensor, room: Tensor, generator: torch.Generator) -> Tensor:
    """How many of `count` regrowths each layer gets: independent draws with probability ~ size.

    Draws beyond a layer's `room` (dormant positions) are drawn again among layers with room left.
    """
    drawn = torch.zeros_like(room)
    while count > 0:
        weights = (sizes * (drawn < room)).double().to(generator.device)
        choice = torch.multinomial(weights, count, replacement=True, generator=generator)
        drawn += torch.bincount(choice.cpu(), minlength=len(room))
        count = int((drawn - room).clamp(min=0).sum())
        drawn = torch.minimum(drawn, room)
    return drawn


def stages(params: Params, sparsity: float) -> list[Stage]:
    """One stage from scratch."""
    return [SamplingStage(params)]
