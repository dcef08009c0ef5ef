"""The interface between a method and the training loop. A method is a list of stages.

A method file defines `Params` (a pydantic model), `LABEL` (its printed name) and

    def stages(params: Params) -> list[Stage]

A method that starts from the weights of another cell also defines `STARTS_FROM = "dense"`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robsparse.compute.optimizer import SGD
from robsparse.schema.training import Fit, ScoreTraining, WeightPerturbation
from robsparse.sparsity.averaging import WeightAverage
from robsparse.sparsity.history import ConnectionLog
from robsparse.sparsity.layers import nonzero_count, prunable, trained_weight, weight_count
from robsparse.sparsity.masks import apply_masks, bake, magnitude_masks


@dataclass
class Run:
    """The values that the hooks of a stage may read and change.

    step: the current step. It counts from 0 over all epochs of the stage.
    steps: the number of steps of the stage.
    epoch: the current epoch of the stage, from 0.
    lr, lr_factor: the learning rate of the step, and its ratio to the initial one of the stage.
    generator: random numbers for the method, on the device of the model.
    precision: the precision of the training pass.
    optimizer: is created after before_fit. In before_fit there is none.
    connections: a stage that rewires sets this log in before_fit and records each step in it.
    log_every: the number of steps for one row of the log.
    curve: the points of the curve so far, one for each epoch of the cell. Empty in before_fit.
    train_accuracy: share of the images of the last step that the network classified correctly in
        the pass of training. Only if the stage follows overfitting.
    awp: settings of the adversarial weight perturbation, or None.
    average: the moving average of the weights, or None. Hooks do not change it, and the next stage
        continues from the trained weights.
    sparse_compute: whether the training pass may compute with the active weights only.
    computed: how the training pass last computed each layer with a known mask: "sparse" or "dense".

    In before_step and after_step, `step` is the current step. In before_epoch it is the first step
    of the epoch, in finalize the last step of the stage. In before_fit it is 0, and `lr` is the
    initial learning rate. The hooks of a resumed run see the same values as without interruption.
    """

    model: nn.Module
    sparsity: float
    generator: torch.Generator
    arch: str = ""
    precision: str = "fp32"
    log_every: int = 1
    curve: list[dict[str, Any]] = field(default_factory=list)
    train_accuracy: float | Tensor = 0.0
    connections: ConnectionLog | None = None
    awp: WeightPerturbation | None = None
    average: WeightAverage | None = None
    sparse_compute: bool = False
    computed: dict[str, str] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer = field(init=False, repr=False, compare=False)
    lr: float = 0.0
    lr_factor: float = 1.0
    epoch: int = 0
    step: int = 0
    steps: int = 0

    @property
    def gamma(self) -> float:
        """Length of the weight perturbation of this step, as a share of a layer's norm; 0: none."""
        return self.awp.gamma if self.awp and self.epoch >= self.awp.warmup else 0.0

    @property
    def exported(self) -> nn.Module:
        """The network for validation, selection and export: the average or the model."""
        return self.model if self.average is None else self.average.network


class Stage:
    """One phase of training. Subclass it and override the hooks that the method needs.

    name: the name in curves: pretrain, prune, finetune, train, ...
    selectable: whether the network has its target sparsity in all epochs. Then the weights of any
        epoch may be exported as `best_val` or `best_clean`.
    follows_overfitting: whether the curve also has `train_accuracy`, the accuracy in the passes of
        training, and `val_loss`, the loss on validation images under attack.
    """

    name = "train"
    selectable = True
    follows_overfitting = False

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def before_fit(self, run: Run) -> None:
        """Prepare the model (masks, parametrisations).

        A resumed run calls it again, with the same network, random numbers and log of connections
        as at the first call.
        """

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that this stage trains. All others keep their values."""
        return list(model.parameters())

    def before_epoch(self, run: Run) -> None:
        """Called before the first step of each epoch. `run.epoch` counts from 0."""

    def score_gamma(self, run: Run) -> float:
        """Return the length of the perturbation of scores, as a share of their norm; 0: none."""
        return 0.0

    def penalty(self, run: Run) -> Tensor | None:
        """Return a term that is added to the loss of each step, or None."""
        return None

    def reads_all_gradients(self, run: Run) -> bool:
        """Return whether this step reads the gradients of masked weights too.

        In all other steps, the training pass need not compute them.
        """
        return False

    def before_step(self, run: Run) -> None:
        """Called after the backward pass and before the optimiser changes the parameters."""

    def after_step(self, run: Run) -> None:
        """Called after the optimiser changed the parameters."""

    def finalize(self, run: Run) -> None:
        """Make a plain network with exact zeros for the next stage and the export."""
        bake(run.model)

    def active_weights(self, run: Run) -> int:
        """Return the number of prunable weights that training needs now.

        The number is larger than that of the forward pass if the method scores or regularises
        masked weights.
        """
        return nonzero_count(run.model)

    def state(self) -> dict[str, Any]:
        """Return the state of the stage for a checkpoint (tensors and numbers)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a result of `state`."""

    def lr_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the learning rate of a step as a multiple of the initial learning rate."""
        return schedule_factor(self.fit, step, steps_per_epoch)


def begin_stage(run: Run, stage: Stage, steps: int) -> None:
    """Let a stage with this number of steps prepare the network, and make its optimiser.

    Parameters that the stage does not train get no gradients.
    """
    fit = stage.fit
    run.epoch, run.step, run.steps = 0, 0, steps
    run.lr, run.lr_factor = fit.lr, 1.0
    vars(run).pop("optimizer", None)  # of the previous stage
    stage.before_fit(run)
    trained = stage.parameters(run.model)
    for parameter in run.model.parameters():
        parameter.grad = None
        parameter.requires_grad_(any(parameter is other for other in trained))
    run.optimizer = SGD(
        trained,
        lr=fit.lr,
        momentum=fit.momentum,
        nesterov=fit.nesterov,
        weight_decay=fit.weight_decay if fit.decay == "coupled" else 0.0,
    )
    if run.average is not None:
        run.average.restart(run.model)


def end_stage(run: Run, stage: Stage) -> None:
    """Let the stage finish the network, and set the same weights to 0 in the average."""
    stage.finalize(run)
    if run.average is not None:
        run.average.follow(run.model)


def state_bytes(run: Run, stage: Stage) -> int:
    """Return the bytes that training holds between two steps, and its gradients.

    These are the parameters and buffers of the network (masks, signs and scores are among them),
    one gradient for each trained parameter, the state of the optimiser and of the stage, and the
    moving average. Images, maps, and weights that exist only during a pass are not counted.
    """
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    tensors = [*run.model.parameters(), *run.model.buffers(), *trained]
    for state in (*run.optimizer.state.values(), stage.state()):
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    if run.average is not None:
        tensors += run.average.network.state_dict().values()
    return sum(tensor.nbytes for tensor in tensors)


Masks = Callable[[Run], dict[str, Tensor]]


def largest_weights(run: Run, pattern: str | None = None) -> dict[str, Tensor]:
    """Return masks of the largest `|w|`, with the same share in every layer."""
    return magnitude_masks(run.model, run.sparsity, pattern)


def remaining_weights(run: Run) -> dict[str, Tensor]:
    """Return masks of the nonzero weights, which an earlier stage has kept."""
    return {name: module.weight.detach() != 0 for name, module in prunable(run.model).items()}


class FixedMaskStage(Stage):
    """Train only the weights inside a fixed mask.

    `masks` computes the mask once, from the network at the start of the stage.
    """

    def __init__(self, name: str, fit: Fit, masks: Masks = largest_weights) -> None:
        super().__init__(fit)
        self.name, self.masks = name, masks

    def before_fit(self, run: Run) -> None:
        apply_masks(run.model, self.masks(run))


class ScoreStage(Stage):
    """Train batch norm, and scores that decide which weights are kept, but no weight or bias.

    Each prunable layer has a parametrisation of the class `Scored`.
    """

    def score_gamma(self, run: Run) -> float:
        s2ap = self.fit.s2ap if isinstance(self.fit, ScoreTraining) else None
        return s2ap.gamma if s2ap and run.epoch >= s2ap.warmup else 0.0

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        frozen = set()
        for module in prunable(model).values():
            frozen |= {id(trained_weight(module)), id(module.bias)}
        return [p for p in model.parameters() if id(p) not in frozen]

    def active_weights(self, run: Run) -> int:
        # Every weight has a score with a gradient, so training needs the dense network.
        return weight_count(run.model)


def schedule_factor(fit: Fit, step: int, steps_per_epoch: int) -> float:
    """Return the factor on the initial learning rate at step t = 0, 1, ... of a stage.

    cosine: (1 + cos(pi t / T)) / 2, for T steps.
    cosine_epochs: (1 + cos(pi (e - 1) / E)) / 2 in epoch e of E.
    step: one factor gamma for each milestone that has passed.
    In a warm-up of W steps, the factor is multiplied by (t + 1) / W.
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
