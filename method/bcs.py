"""Bayesian connectivity sampling (BCS): robust training that is sparse from first to last step.

Each prunable weight is w = s * theta where theta > 0 and exactly 0 elsewhere (dormant); the sign s
is fixed. A step of SGD on the robust loss moves the active theta, a little noise is added to them,
and those that cross zero become dormant. The same number is regrown at random dormant positions, so
that the number of active weights is constant. This samples from a posterior over connectivities and
weights whose prior allows no more than that number (DEEP R, Bellec et al., ICLR 2018, with the
global constraint).

Source: the ICML 2021 paper's published code, IGITUGraz/SparseAdversarialTraining, behaviour of
models/layers.py, models/sparse_*.py and run_connectivity_sampling.py; a step has their order.

Where this differs from the authors' code, and the switch that brings their behaviour back:
- `init: strict` (theirs: `authors`). They give each layer a fixed share of active weights; the sum
  falls short of the budget (the first rewiring tops it up) or exceeds it (nothing is removed until
  enough weights become dormant). Strict makes it exact before the first step.
- `waking: drawn` (theirs: `drift`). A dormant theta stays dormant until it is drawn; theirs can
  drift back over zero when noise killed it against its momentum, and exceed the budget.
- A layer never gets more regrowths than it has dormant positions; the remainder is drawn again
  over the others. Theirs stops with a shape error, so there is no switch.
- Theirs shuffles all dormant positions of a layer at every step; here positions are tried at random
  until enough are dormant, which comes to the same distribution (`robsparse.sparsity.rewiring`). On
  a GPU, a regrowth that found no place in a fixed number of tries comes one step later.
Kept as theirs, with another choice offered: `momentum`, `regrowth`, `noise_scale` or
`temperature`, `rewiring`; of `train`: `decay` (sgdw: not multiplied by lr, on theta, biases and
batch norm alike) and `velocity`.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.base.counts import density, keep_count, round_to_sum
from robsparse.schema import Fit, Strict
from robsparse.sparsity.budgets import erk_keep_counts
from robsparse.sparsity.history import ConnectionLog
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.rewiring import Changes, Rewiring, rewiring_of
from robsparse.training.stages import Run, Stage

LABEL = "BCS"

# The authors' initial densities of layers by the first part of their name; all other layers have
# half the target density. Where an architecture is not theirs, first and last layer have 0.6.
AUTHORS_DENSITIES = {
    "vgg16": {"conv1": 0.6, "conv2": 0.6, "conv3": 0.2, "conv4": 0.2, "fc16": 0.6},
    "resnet": {"conv1": 0.6, "stage1": 0.2, "classifier": 0.6},
    "wrn": {"conv1": 0.6, "block1": 0.1, "classifier": 0.6},
}


class Train(Fit):
    """The authors' schedule: 200 epochs, lr 0.1 dropping by 10 at 50 % and 75 %, SGDW 5e-4."""

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.1
    schedule: Literal["constant", "cosine", "step"] = "step"
    velocity: Literal["torch", "tensorflow"] = "tensorflow"
    weight_decay: float = Field(5e-4, ge=0)
    decay: Literal["coupled", "sgdw"] = "sgdw"


class Params(Strict):
    """Hyperparameters; the defaults are the authors', except for `init` and `waking`."""

    train: Train = Train()
    init: Literal["strict", "authors", "erk", "uniform"] = Field(
        "strict",
        description="initial active weights of the layers. authors: their shares as they are; "
        "strict: theirs, topped up or thinned out at random to exactly the budget; erk: "
        "Erdos-Renyi-Kernel shares; uniform: the same density in all (both exactly the budget)",
    )
    waking: Literal["drawn", "drift"] = Field(
        "drawn", description="whether a dormant theta wakes only when drawn, or also by itself"
    )
    noise_scale: float = Field(
        1e-6, ge=0, description="noise on active theta is lr * scale * N(0,1)"
    )
    temperature: float | None = Field(
        None, ge=0, description="instead of noise_scale: Langevin noise sqrt(2 lr T) * N(0,1)"
    )
    regrown_theta: PositiveFloat = Field(1e-12, description="value of a regrown theta")
    regrowth: Literal["size", "dormant"] = Field(
        "size",
        description="layers are drawn with probability ~ their size (authors) or ~ the number of "
        "their dormant positions",
    )
    momentum: Literal["keep", "reset"] = Field(
        "keep",
        description="velocity of a regrown theta: keep the stale one (authors) or reset to 0",
    )
    rewiring: Literal["always", "until_last_drop", "never"] = Field(
        "always",
        description="until when connections are replaced (authors: always); afterwards the live "
        "set is fixed and its weights may change sign. never: a static random network",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        if self.temperature is not None and "noise_scale" in self.model_fields_set:
            raise ValueError("expected noise_scale or temperature, not both")
        if self.rewiring == "until_last_drop" and self.train.schedule != "step":
            raise ValueError("rewiring until_last_drop: expected train.schedule to be 'step'")
        if self.rewiring == "until_last_drop" and not self.train.milestones:
            raise ValueError("rewiring until_last_drop: expected one of train.milestones at least")
        if self.rewiring == "never" and self.init == "authors":
            raise ValueError("rewiring never: expected an init that meets the budget by itself")
        return self


class SignedTheta(nn.Module):
    """Parametrisation theta -> sign * theta where theta > 0, else exactly 0.

    Once the active set is fixed, sign is 0 at dormant positions and theta goes through as it is.
    """

    def __init__(self, sign: Tensor) -> None:
        super().__init__()
        self.register_buffer("sign", sign)
        self.fixed = False

    def forward(self, theta: Tensor) -> Tensor:
        return self.sign * (theta if self.fixed else torch.relu(theta))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def fix(self, active: Tensor) -> None:
        """Make `active` (bool, the weight's shape) the active set, whatever theta does later."""
        self.sign.mul_(active)
        self.fixed = True

    def get_extra_state(self) -> bool:
        """What a checkpoint keeps besides the sign."""
        return self.fixed

    def set_extra_state(self, state: bool) -> None:
        """Take it back."""
        self.fixed = state


class SamplingStage(Stage):
    """The one stage of BCS: SGD on theta, noise, rewiring."""

    name = "train"

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params
        self.rewiring: Rewiring | None = None
        self.saved_active: Tensor | None = None  # of an interrupted run
        self.fixed = False  # whether rewiring is over

    def before_fit(self, run: Run) -> None:
        self.rewiring = self.saved_active = None
        counts = initial_counts(run, self.params.init)
        for name, module in prunable(run.model).items():
            weight = module.weight.detach()
            sign = torch.where(weight < 0, -1.0, 1.0)
            parametrize.register_parametrization(module, "weight", SignedTheta(sign))
            order = torch.randperm(weight.numel(), generator=run.generator, device=weight.device)
            theta = module.parametrizations.weight.original.data
            theta.clamp_(min=self.params.regrown_theta)  # a drawn weight may be 0 by chance
            theta.view(-1)[order[counts[name] :]] = 0.0
        active = dict(zip(prunable(run.model), active_masks(run.model), strict=True))
        run.connections = ConnectionLog(active, run.log_every)

    def before_step(self, run: Run) -> None:
        if self.rewiring is None or not self.rewiring.is_intact():
            self._gather(run)
        if self.params.waking == "drift" and not self.fixed:
            self.rewiring.find_active()
        if self._rewiring_is_over(run) and not self.fixed:
            for layer, theta in zip(signed_layers(run.model), thetas(run.model), strict=True):
                layer.fix(theta > 0)
            self.fixed = True

    def _gather(self, run: Run) -> None:
        """Gather all theta; the active ones are those of the network or of an interrupted run."""
        active = self.saved_active
        if active is None:
            active = torch.cat([mask.flatten() for mask in active_masks(run.model)])
            active = active.nonzero().squeeze(1)
        layers = thetas(run.model)
        budget = keep_count(sum(theta.numel() for theta in layers), run.sparsity)
        self.rewiring = rewiring_of(layers, active.to(layers[0].device), budget, run.generator)
        self.saved_active = None
        self.fixed = all(layer.fixed for layer in signed_layers(run.model))

    def _rewiring_is_over(self, run: Run) -> bool:
        if self.params.rewiring == "until_last_drop":
            return run.step / run.steps >= max(self.fit.milestones)
        return self.params.rewiring == "never"

    def after_step(self, run: Run) -> None:
        rewiring, params, may_wake = self.rewiring, self.params, self.params.waking == "drift"
        nothing = rewiring.active[:0]
        changes = Changes(nothing, nothing, nothing)
        with torch.no_grad():
            survives = rewiring.move(self._noise(run), may_wake=may_wake)
            if not self.fixed:
                changes = rewiring.rewire(
                    survives,
                    params.regrown_theta,
                    by_room=params.regrowth == "dormant",
                    may_wake=may_wake,
                )
            if params.momentum == "reset" and len(changes.drawn):
                states = [run.optimizer.state[theta] for theta in rewiring.layers]
                rewiring.reset([state.get("momentum_buffer") for state in states], changes.drawn)
        run.connections.record(changes.pruned, torch.cat([changes.woken, changes.drawn]))

    def _noise(self, run: Run) -> float:
        """Standard deviation of the noise on an active theta."""
        if self.params.temperature is not None:
            return (2 * run.lr * self.params.temperature) ** 0.5
        return run.lr * self.params.noise_scale

    def state(self) -> dict[str, Any]:
        """The active positions: noise and draws go on in their order."""
        active = self.saved_active if self.rewiring is None else self.rewiring.active
        return {} if active is None else {"active": active.int()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.saved_active = state["active"].long() if state else None


def thetas(model: nn.Module) -> list[Tensor]:
    """The trainable theta of each prunable layer."""
    return [module.parametrizations.weight.original for module in prunable(model).values()]


def signed_layers(model: nn.Module) -> list[SignedTheta]:
    """The parametrisation of each prunable layer."""
    return [module.parametrizations.weight[0] for module in prunable(model).values()]


def active_masks(model: nn.Module) -> list[Tensor]:
    """Where the weights of each prunable layer are active (bool, the weight's shape)."""
    return [
        layer.sign != 0 if layer.fixed else theta > 0
        for layer, theta in zip(signed_layers(model), thetas(model), strict=True)
    ]


def initial_counts(run: Run, init: str) -> dict[str, int]:
    """Nonzero weights of each layer before the first step, by `Params.init`."""
    if init == "erk":
        return erk_keep_counts(run.model, run.sparsity)
    sizes = {name: module.weight.numel() for name, module in prunable(run.model).items()}
    budget = keep_count(sum(sizes.values()), run.sparsity)
    if init == "uniform":
        wanted = {name: density(run.sparsity) * size for name, size in sizes.items()}
        return round_to_sum(wanted, sizes, budget)
    counts = authors_counts(sizes, run.arch, run.sparsity)
    return counts if init == "authors" else _brought_to(budget, counts, sizes, run.generator)


def authors_counts(sizes: dict[str, int], arch: str, sparsity: float) -> dict[str, int]:
    """The authors' initial active counts of layers with the given sizes, in forward order."""
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


def _brought_to(
    budget: int, counts: dict[str, int], sizes: dict[str, int], generator: torch.Generator
) -> dict[str, int]:
    """Counts that sum to the budget: topped up as rewiring does, or thinned out uniformly."""
    have, size = np.array(list(counts.values())), np.array(list(sizes.values()))
    missing = budget - int(have.sum())
    if missing >= 0:
        have += draw_layers(missing, size, size - have, generator)
    else:
        gone = torch.randperm(int(have.sum()), generator=generator, device=generator.device)
        layer_of = have.cumsum().searchsorted(gone[:-missing].cpu().numpy(), side="right")
        have = have - np.bincount(layer_of, minlength=len(have))
    return dict(zip(counts, have.tolist(), strict=True))


def draw_layers(
    count: int, chances: np.ndarray, room: np.ndarray, generator: torch.Generator
) -> np.ndarray:
    """How many of `count` regrowths each layer gets: independent draws with probability ~ chances.

    Draws beyond a layer's `room` (dormant positions) are drawn again among layers with room left.
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
    """One stage from scratch."""
    return [SamplingStage(params)]
