"""The contract between a method and the one training loop: a method is a list of stages.

A method file defines `Params` (a pydantic model), `LABEL` (its printed name) and

    def stages(params: Params) -> list[Stage]

and, when it starts from another cell's weights, the literal `STARTS_FROM = "dense"`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robsparse.schema.training import Fit
from robsparse.sparsity.history import ConnectionLog
from robsparse.sparsity.layers import nonzero_count, prunable, trained_weight, weight_count
from robsparse.sparsity.masks import apply_masks, bake, magnitude_masks


@dataclass
class Run:
    """What a stage's hooks may read and change while it trains.

    `step` counts from 0 through all epochs of the stage, which has `steps` in all; `lr` is its
    learning rate, `lr_factor` the ratio to the stage's initial one. In before_step and after_step
    they are those of the step that is taken, in before_epoch of the epoch's first step, in finalize
    of the last one. In before_fit `step` is 0 and `lr` the initial one. A resumed run shows the
    hooks the same as one that was never interrupted.

    `generator` lives on the model's device and serves the method's own randomness. `optimizer` is
    made after before_fit, where there is none. `precision` is that of the training pass. A stage
    that rewires sets `connections` in before_fit and records each step there, one row for every
    `log_every` steps.
    """

    model: nn.Module
    sparsity: float
    generator: torch.Generator
    arch: str = ""
    precision: str = "fp32"
    log_every: int = 1
    connections: ConnectionLog | None = None
    optimizer: torch.optim.Optimizer = field(init=False, repr=False, compare=False)
    lr: float = 0.0
    lr_factor: float = 1.0
    epoch: int = 0
    step: int = 0
    steps: int = 0


class Stage:
    """One phase of training. Subclass it and override the hooks that the method needs.

    name: pretrain, prune, finetune, train, ... as printed in curves.
    selectable: whether the network is at its target sparsity throughout, so that the weights of
        any epoch may be exported as `best_val`.
    """

    name = "train"
    selectable = True

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def before_fit(self, run: Run) -> None:
        """Prepare the model (masks, parametrisations).

        A resumed run calls it again, with the network, the random numbers and the log of
        connections as they were at the first call.
        """

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that this stage trains; all others keep their values."""
        return list(model.parameters())

    def before_epoch(self, run: Run) -> None:
        """Called before the first step of each epoch; `run.epoch` counts from 0."""

    def penalty(self, run: Run) -> Tensor | None:
        """A term to add to the loss of each step."""
        return None

    def before_step(self, run: Run) -> None:
        """Called with gradients in place, just before the optimiser changes the parameters."""

    def after_step(self, run: Run) -> None:
        """Called after the optimiser changed the parameters."""

    def finalize(self, run: Run) -> None:
        """Leave a plain network with exact zeros for the next stage and the export."""
        bake(run.model)

    def active_weights(self, run: Run) -> int:
        """Number of prunable weights that training must hold now.

        These are more than the forward pass uses if the method scores or regularises weights that
        it masks.
        """
        return nonzero_count(run.model)

    def state(self) -> dict[str, Any]:
        """What the stage itself must remember across an interruption (tensors and numbers)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step as a multiple of the initial one."""
        return schedule_factor(self.fit, step, steps_per_epoch)


def begin_stage(run: Run, stage: Stage, steps: int) -> None:
    """Let a stage of so many steps prepare the network, and make its optimiser."""
    fit = stage.fit
    run.epoch, run.step, run.steps = 0, 0, steps
    run.lr, run.lr_factor = fit.lr, 1.0
    vars(run).pop("optimizer", None)  # that of the stage before
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(
        stage.parameters(run.model),
        lr=fit.lr,
        momentum=fit.momentum,
        nesterov=fit.nesterov,
        weight_decay=fit.weight_decay if fit.decay == "coupled" else 0.0,
    )


Masks = Callable[[Run], dict[str, Tensor]]


def largest_weights(run: Run) -> dict[str, Tensor]:
    """Masks of the largest |w|, the same share of every layer."""
    return magnitude_masks(run.model, run.sparsity)


def remaining_weights(run: Run) -> dict[str, Tensor]:
    """Masks of the weights that an earlier stage has left, whatever their share of each layer."""
    return {name: module.weight.detach() != 0 for name, module in prunable(run.model).items()}


class FixedMaskStage(Stage):
    """Train the weights under a mask and no others.

    The mask is drawn once, by `masks`, from the network that the stage starts with.
    """

    def __init__(self, name: str, fit: Fit, masks: Masks = largest_weights) -> None:
        super().__init__(fit)
        self.name, self.masks = name, masks

    def before_fit(self, run: Run) -> None:
        apply_masks(run.model, self.masks(run))


class ScoreStage(Stage):
    """Train scores that decide which weights are kept, and batch norm; no weight and no bias."""

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        frozen = set()
        for module in prunable(model).values():
            frozen |= {id(trained_weight(module)), id(module.bias)}
        return [p for p in model.parameters() if id(p) not in frozen]

    def active_weights(self, run: Run) -> int:
        # Every weight has a score that gets a gradient: training holds the dense network.
        return weight_count(run.model)


def schedule_factor(fit: Fit, step: int, steps_per_epoch: int) -> float:
    """Factor on the initial learning rate at step 0, 1, ... of a stage.

    cosine: (1 + cos(pi t / T)) / 2 for each step; cosine_epochs: (1 + cos(pi (e - 1) / E)) / 2 for
    each epoch. step: gamma for each milestone passed.
    In the W steps of a warm-up it is (t + 1) / W of that.
    """
    share = step / (fit.epochs * steps_per_epoch)
    factor = 1.0
    if fit.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * share))
    if fit.schedule == "cosine_epochs":
        epoch = step // steps_per_epoch
        factor = 0.5 * (1 + math.cos(math.pi * (epoch - 1) / fit.epochs))
    if fit.schedule == "step":
        factor = fit.gamma ** sum(share >= milestone for milestone in fit.milestones)
    if step < fit.warmup * steps_per_epoch:
        factor *= (step + 1) / (fit.warmup * steps_per_epoch)
    return factor
