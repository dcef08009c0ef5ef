"""Bayesian connectivity sampling (BCS): robust training that is sparse from first to last step.

Each prunable weight is w = s * theta if theta > 0 (active), and exactly 0 otherwise (dormant). The
sign s is fixed. A step of SGD on the robust loss changes the active theta, and noise is added to
them. A theta that crosses zero becomes dormant. The same number of connections is regrown at random
dormant positions, so the number of active weights is constant. The method samples from a posterior
over connectivities and weights; its prior allows only this number of active weights (DEEP R, Bellec
et al., ICLR 2018, with the global constraint).

Source: the published code of the ICML 2021 paper, IGITUGraz/SparseAdversarialTraining, behaviour of
models/layers.py, models/sparse_*.py and run_connectivity_sampling.py. A step does the same things
in the same order.

Differs from the authors' code (a setting in parentheses restores their behaviour):
- The number of active weights equals the budget before the first step. The authors give each layer
  a fixed share (`init: authors`). If the sum is below the budget, the first rewiring adds
  connections. If it exceeds the budget, it decreases only when weights become dormant.
- A dormant theta stays dormant until it is drawn. In the authors' code a theta that noise has made
  dormant can drift back over zero by its momentum (`waking: drift`). The network can then exceed
  its budget.
- A layer never gets more regrown connections than it has dormant positions; the remainder is drawn
  again among the other layers. The authors' code stops with a shape error (no setting).
- Random positions are drawn until enough of them are dormant. The authors shuffle all dormant
  positions of a layer at every step. Both give the same distribution
  (`robsparse.sparsity.rewiring`). On a GPU the number of draws is fixed; a connection that finds no
  position is regrown one step later (no setting).
As in the authors' code, but with a choice: `momentum`, `regrowth`, `noise_scale` or `temperature`,
`rewiring`; in `train`: `velocity` and `decay` (sgdw does not multiply the decay by lr, and decays
theta, biases and batch norm). `pattern` is not part of the publication: connections start and are
regrown only where a group of M weights has fewer than N active ones.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.counts import density, keep_count, round_to_sum
from robsparse.schema import Fit, Pattern, Strict
from robsparse.sparsity.budgets import capacities, erk_keep_counts
from robsparse.sparsity.compact_rewiring import CompactRewiring
from robsparse.sparsity.compact_weight import Theta, held_layers, hold_compactly
from robsparse.sparsity.history import ConnectionLog
from robsparse.sparsity.layers import parametrisation, prunable, trained_weight, weight_count
from robsparse.sparsity.masks import random_masks
from robsparse.sparsity.rewiring import Changes, Rewiring, make_rewiring
from robsparse.training.stages import Run, Stage

LABEL = "BCS"

# The authors' initial densities of layers, by the first part of a layer's name. All other layers
# have half the target density. If the authors do not have an architecture, its first and last layer
# have 0.6.
AUTHORS_DENSITIES = {
    "vgg16": {"conv1": 0.6, "conv2": 0.6, "conv3": 0.2, "conv4": 0.2, "fc16": 0.6},
    "resnet": {"conv1": 0.6, "stage1": 0.2, "classifier": 0.6},
    "wrn": {"conv1": 0.6, "block1": 0.1, "classifier": 0.6},
}


class Train(Fit):
    """The authors' schedule: 200 epochs, lr 0.1, divided by 10 at 50 % and 75 %, SGDW 5e-4."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.1
    schedule: Literal["constant", "cosine", "step"] = "step"
    velocity: Literal["torch", "tensorflow"] = "tensorflow"
    weight_decay: float = Field(5e-4, ge=0)
    decay: Literal["coupled", "sgdw"] = "sgdw"


class Params(Strict):
    """Hyperparameters. The defaults are the authors', except for `init` and `waking`.

    train: the only stage.
    """

    train: Train = Train()
    init: Literal["strict", "authors", "erk", "uniform"] = Field(
        "strict",
        description="initial active weights of the layers. authors: the authors' densities, which "
        "may miss the budget; strict: the authors' densities, then connections are added or "
        "removed at random to meet the budget; erk: Erdos-Renyi-Kernel densities; uniform: the "
        "same density in all layers (strict, erk and uniform meet the budget exactly)",
    )
    waking: Literal["drawn", "drift"] = Field(
        "drawn",
        description="when a dormant theta becomes active: only when it is drawn, or also when it "
        "drifts over zero",
    )
    noise_scale: float = Field(
        1e-6, ge=0, description="noise on active theta is lr * scale * N(0,1)"
    )
    temperature: float | None = Field(
        None, ge=0, description="replaces noise_scale: Langevin noise sqrt(2 lr T) * N(0,1)"
    )
    regrown_theta: PositiveFloat = Field(1e-12, description="value of a regrown theta")
    regrowth: Literal["size", "dormant"] = Field(
        "size",
        description="probability of a layer to be drawn: proportional to its size (authors), or to "
        "the number of its dormant positions",
    )
    momentum: Literal["keep", "reset"] = Field(
        "keep",
        description="velocity of a regrown theta: keep the old value (authors), or reset it to 0",
    )
    rewiring: Literal["always", "until_last_drop", "never"] = Field(
        "always",
        description="how long connections are replaced (authors: always). Then the active set is "
        "fixed, and its weights may change sign. never: a static random network",
    )
    pattern: Pattern | None = Field(
        None, description="N:M sparsity, e.g. '2:4': of each M weights, at most N are active"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        if self.temperature is not None and "noise_scale" in self.model_fields_set:
            raise ValueError("expected noise_scale or temperature, not both")
        if self.rewiring == "until_last_drop" and self.train.schedule != "step":
            raise ValueError("rewiring until_last_drop: expected train.schedule to be 'step'")
        if self.rewiring == "until_last_drop" and not self.train.milestones:
            raise ValueError("rewiring until_last_drop: expected at least one of train.milestones")
        if self.rewiring == "never" and self.init == "authors":
            raise ValueError("rewiring never: expected an init that meets the budget exactly")
        if self.pattern is not None and self.init == "authors":
            raise ValueError("pattern: expected an init that meets the budget exactly")
        if self.pattern is not None and self.waking == "drift":
            raise ValueError("pattern: expected waking 'drawn', because drift ignores the groups")
        return self


class SignedTheta(Theta):
    """A `Theta` with memory for all connections; theta has the shape of the weight.

    After the active set is fixed, sign is 0 at dormant positions.
    """

    sign: Tensor

    def __init__(self, sign: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", sign)

    def forward(self, theta: Tensor) -> Tensor:
        return self.sign * (theta if self.fixed else torch.relu(theta))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def active(self, theta: Tensor) -> Tensor:
        return self.sign != 0 if self.fixed else theta > 0

    def fix(self, active: Tensor) -> None:
        self.sign.mul_(active)
        super().fix(active)


class SamplingStage(Stage):
    """The only stage of BCS: SGD on theta, noise, rewiring."""

    name = "train"

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params
        self.rewiring: Rewiring | None = None
        self.saved_active: Tensor | None = None  # of an interrupted run
        self.fixed = False  # whether rewiring is over
        self.compact = False  # whether dormant theta have no memory

    def before_fit(self, run: Run) -> None:
        self.rewiring = self.saved_active = None
        self.compact = self._may_be_compact(run)
        pattern = self.params.pattern
        counts = initial_counts(run, self.params.init, pattern)
        masks = random_masks(run.model, counts, run.generator, pattern)
        for name, module in prunable(run.model).items():
            weight = module.weight.detach()
            sign = torch.where(weight < 0, -1.0, 1.0)
            # a drawn weight may be 0 by chance
            theta = weight.abs().clamp_(min=self.params.regrown_theta)
            theta.masked_fill_(~masks[name], 0.0)
            if self.compact:
                hold_compactly(module, theta, sign)
            else:
                parametrize.register_parametrization(module, "weight", SignedTheta(sign))
                trained_weight(module).data.copy_(theta)
        run.connections = ConnectionLog(masks, run.log_every)

    def _may_be_compact(self, run: Run) -> bool:
        """Return whether this run holds no dormant theta. All results are the same.

        The sparse training pass must be allowed. A dormant theta must not matter: it must not wake
        by drift, and weight decay must not change a velocity that is kept.
        """
        params, fit = self.params, self.fit
        if not run.sparse_compute or run.generator.device.type != "cpu" or run.awp is not None:
            return False
        decays = fit.decay == "coupled" and fit.weight_decay > 0 and fit.momentum > 0
        matters = decays and params.momentum == "keep"
        return params.waking == "drawn" and params.pattern is None and not matters

    def before_step(self, run: Run) -> None:
        rewiring = self.rewiring
        if rewiring is None or not rewiring.is_intact():
            rewiring = self._gather(run)
        if self.params.waking == "drift" and not self.fixed:
            rewiring.find_active()
        if self._rewiring_is_over(run) and not self.fixed:
            if isinstance(rewiring, CompactRewiring):
                rewiring.forget_dormant()
            for layer, theta in zip(signed_layers(run.model), thetas(run.model), strict=True):
                layer.fix(theta > 0)
            self.fixed = True

    def _gather(self, run: Run) -> Rewiring:
        """Gather all theta, and the active positions of the network or of an interrupted run."""
        layers, active = thetas(run.model), self.saved_active
        budget = keep_count(weight_count(run.model), run.sparsity)
        if active is None:
            active = torch.cat([mask.flatten() for mask in active_masks(run.model)])
            active = active.nonzero().squeeze(1)
        active = active.to(layers[0].device)
        if self.compact:
            smallest = self._smallest_velocity(layers[0].dtype)
            self.rewiring = CompactRewiring(
                held_layers(run.model), active, budget, run.generator, run.optimizer,
                smallest=smallest,
            )  # fmt: skip
        else:
            pattern = self.params.pattern
            self.rewiring = make_rewiring(layers, active, budget, run.generator, pattern)
        self.saved_active = None
        self.fixed = all(layer.fixed for layer in signed_layers(run.model))
        return self.rewiring

    def _smallest_velocity(self, dtype: torch.dtype) -> float:
        """Return the smallest velocity that can change a regrown theta, in units of gradients.

        All later steps move theta by at most lr * velocity / (1 - momentum) because of it. A
        quarter of the last digit of the regrown value does not change it.
        """
        if self.params.momentum == "reset":
            return math.inf
        digit = self.params.regrown_theta * torch.finfo(dtype).eps / 4
        return digit * (1 - self.fit.momentum) / self.fit.lr

    def _rewiring_is_over(self, run: Run) -> bool:
        if self.params.rewiring == "until_last_drop":
            return run.step / run.steps >= max(self.fit.milestones)
        return self.params.rewiring == "never"

    def after_step(self, run: Run) -> None:
        rewiring, params, allow_drift = self.rewiring, self.params, self.params.waking == "drift"
        assert rewiring is not None
        assert run.connections is not None
        nothing = rewiring.active[:0].long()
        changes = Changes(nothing, nothing, nothing)
        with torch.no_grad():
            survives = rewiring.move(self._noise(run), allow_drift=allow_drift)
            if not self.fixed:
                changes = rewiring.rewire(
                    survives,
                    params.regrown_theta,
                    by_room=params.regrowth == "dormant",
                    allow_drift=allow_drift,
                )
            if params.momentum == "reset" and len(changes.drawn) and not self.compact:
                states = [run.optimizer.state[theta] for theta in rewiring.layers]
                rewiring.reset([state.get("momentum_buffer") for state in states], changes.drawn)
        run.connections.record(changes.pruned, torch.cat([changes.drifted, changes.drawn]))

    def _noise(self, run: Run) -> float:
        """Return the standard deviation of the noise on an active theta."""
        if self.params.temperature is not None:
            return (2 * run.lr * self.params.temperature) ** 0.5
        return run.lr * self.params.noise_scale

    def state(self) -> dict[str, Any]:
        """Return the active positions. Their order matters: noise and draws follow it."""
        active = self.saved_active if self.rewiring is None else self.rewiring.active
        return {} if active is None else {"active": active.int()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.saved_active = state["active"].long() if state else None


def thetas(model: nn.Module) -> list[Tensor]:
    """Return the trainable theta of each prunable layer."""
    return [trained_weight(module) for module in prunable(model).values()]


def signed_layers(model: nn.Module) -> list[Theta]:
    """Return the parametrisation of each prunable layer."""
    return [parametrisation(module, Theta) for module in prunable(model).values()]


def active_masks(model: nn.Module) -> list[Tensor]:
    """Return the active positions of each prunable layer (bool, the weight's shape)."""
    return [
        layer.active(theta)
        for layer, theta in zip(signed_layers(model), thetas(model), strict=True)
    ]


def initial_counts(run: Run, init: str, pattern: str | None = None) -> dict[str, int]:
    """Return the number of active weights of each layer before the first step.

    `init` and `pattern` are those of `Params`. A pattern limits the number of each layer.
    """
    if init == "erk":
        return erk_keep_counts(run.model, run.sparsity, pattern)
    sizes = {name: module.weight.numel() for name, module in prunable(run.model).items()}
    caps, budget = capacities(run.model, pattern), keep_count(sum(sizes.values()), run.sparsity)
    if init == "uniform":
        wanted = {name: density(run.sparsity) * size for name, size in sizes.items()}
        return round_to_sum(wanted, caps, budget)
    counts = authors_counts(sizes, run.arch, run.sparsity)
    if init == "authors":
        return counts
    counts = {name: min(count, caps[name]) for name, count in counts.items()}
    return _adjusted_to(budget, counts, sizes, caps, run.generator)


def authors_counts(sizes: dict[str, int], arch: str, sparsity: float) -> dict[str, int]:
    """Return the authors' initial numbers of active weights of layers.

    `sizes` are the numbers of all weights of the layers, in forward order.
    """
    names = list(sizes)
    table = {names[0]: 0.6, names[-1]: 0.6}
    for prefix, densities in AUTHORS_DENSITIES.items():
        if arch.startswith(prefix):
            table = densities
    half = 0.5 * density(sparsity)
    return {
        name: int(table.get(name, table.get(name.split(".")[0], half)) * size)
        for name, size in sizes.items()
    }


def _adjusted_to(
    budget: int,
    counts: dict[str, int],
    sizes: dict[str, int],
    caps: dict[str, int],
    generator: torch.Generator,
) -> dict[str, int]:
    """Return counts that sum to the budget; none exceeds its cap.

    Missing connections are added as in rewiring; connections in excess are removed uniformly.
    """
    have, size, cap = (np.array(list(part.values())) for part in (counts, sizes, caps))
    missing = budget - int(have.sum())
    if missing >= 0:
        have += draw_layers(missing, size, cap - have, generator)
    else:
        gone = torch.randperm(int(have.sum()), generator=generator, device=generator.device)
        layer_of = have.cumsum().searchsorted(gone[:-missing].cpu().numpy(), side="right")
        have = have - np.bincount(layer_of, minlength=len(have))
    return dict(zip(counts, have.tolist(), strict=True))


def draw_layers(
    count: int, chances: np.ndarray, room: np.ndarray, generator: torch.Generator
) -> np.ndarray:
    """Return how many of `count` regrown connections each layer gets.

    Draws are independent; their probabilities are proportional to `chances`. If a layer gets more
    than its `room` (number of dormant positions), the excess is drawn again among other layers.
    """
    drawn = np.zeros_like(room)
    while count > 0:
        edges = np.cumsum(chances * (drawn < room))
        share = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
        at = share.cpu().numpy() * edges[-1]
        drawn += np.bincount(edges.searchsorted(at, side="right"), minlength=len(room))
        over = np.maximum(drawn - room, 0)
        drawn -= over
        count = int(over.sum())
    return drawn


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [SamplingStage(params)]
