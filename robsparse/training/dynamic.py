"""Dynamic sparse training: at some steps, new weights replace the smallest weights of a mask.

The methods that prune and regrow at intervals use it (SET, RigL, Flying Bird, Flying Bird+, gradual
magnitude pruning). BCS does not use it, because BCS rewires at every step and by other rules.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robsparse.schema.training import Fit, FlyingBirdParams
from robsparse.sparsity.budgets import erk_keep_counts, quota_keep_counts
from robsparse.sparsity.history import ConnectionLog
from robsparse.sparsity.layers import gradient, parametrisation, prunable, trained_weight
from robsparse.sparsity.masks import random_masks, require_finite
from robsparse.training.stages import Run, Stage

NEW_WEIGHT = 1e-12
LOWEST_RATE = 0.005  # Flying Bird's share of exchanged weights at the end of training


class _PassGradient(torch.autograd.Function):
    """w * mask. Masked weights get a gradient too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class OpenMask(nn.Module):
    """Parametrisation w -> w * mask. A masked weight gets the same gradient as without a mask.

    The stage must set this gradient to 0 before the step of the optimiser. `MaskedStage` does so.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return _PassGradient.apply(weight, self.mask)

    def active(self, weight: Tensor) -> Tensor:
        """Return the active positions (bool, the weight's shape)."""
        return self.mask


class MaskedStage(Stage):
    """Train with masks. A subclass sets them in `initial_masks` and `before_masking`."""

    def initial_masks(self, run: Run) -> dict[str, Tensor]:
        """Return bool masks of all prunable layers. By default, they keep all weights."""
        return {
            name: torch.ones_like(module.weight, dtype=torch.bool)
            for name, module in prunable(run.model).items()
        }

    def before_masking(self, run: Run) -> None:
        """Called at each step with the gradients of all weights, also of masked weights."""

    def reads_all_gradients(self, run: Run) -> bool:
        return type(self).before_masking is not MaskedStage.before_masking

    def before_fit(self, run: Run) -> None:
        masks = self.initial_masks(run)
        for name, module in prunable(run.model).items():
            parametrize.register_parametrization(module, "weight", OpenMask(masks[name]))
            trained_weight(module).data.mul_(masks[name])

    def before_step(self, run: Run) -> None:
        self.before_masking(run)
        for _, weight, layer in masked_layers(run.model):
            if weight.grad is not None:
                weight.grad.mul_(layer.mask)

    def active_weights(self, run: Run) -> int:
        return sum(int(layer.mask.sum()) for _, _, layer in masked_layers(run.model))


class DynamicStage(MaskedStage):
    """At some steps, drop the smallest weights of each layer and grow others.

    A method defines the steps (`due`), the number (`fraction`) and the new positions
    (`growth_scores`). New weights have no momentum and the value NEW_WEIGHT. This value is too
    small to change a sum, but it is nonzero even without a gradient. A connection that is dropped
    and grown in the same update keeps its value and its momentum. Therefore an update does not
    change a dense layer. The authors of RigL (`reinit_when_same=False`) and of Flying Bird do the
    same.
    """

    # Whether an update of the mask replaces the step of the optimiser.
    update_replaces_step = False
    # Whether a connection that is dropped and grown in the same update becomes a new connection.
    restarts_regrown = False

    def __init__(self, fit: Fit) -> None:
        super().__init__(fit)
        self.is_due = False
        self.gradients: dict[str, Tensor] = {}
        self.changes: list[tuple[Tensor, Tensor]] = []

    def initial_masks(self, run: Run) -> dict[str, Tensor]:
        """Return masks with random positions and the Erdos-Renyi-Kernel shares of layers."""
        return random_masks(run.model, erk_keep_counts(run.model, run.sparsity), run.generator)

    def due(self, run: Run) -> bool:
        """Return whether the mask is updated at this step."""
        raise NotImplementedError

    def reads_all_gradients(self, run: Run) -> bool:
        changed = type(self).before_masking is not DynamicStage.before_masking
        return changed or self.due(run)

    def fraction(self, run: Run) -> float:
        """Return the share of the active weights of a layer that an update drops."""
        raise NotImplementedError

    def dropped_count(self, run: Run, mask: Tensor) -> int:
        """Return the number of active weights of a layer that an update drops, rounded down."""
        return int(self.fraction(run) * int(mask.sum()))

    def grown_count(self, run: Run, mask: Tensor, dropped: int) -> int:
        """Return the number of weights of a layer that an update grows: as many as it drops.

        `mask` is the mask before the update.
        """
        return dropped

    def to_drop(self, run: Run, weight: Tensor, mask: Tensor) -> Tensor:
        """Return the flat positions of the active weights to drop: the smallest weights."""
        count = self.dropped_count(run, mask)
        size = torch.where(mask, weight.abs(), torch.inf).flatten()
        return size.topk(count, largest=False).indices

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        """Return scores of all positions. The masked ones with the largest scores become active."""
        raise NotImplementedError

    def before_fit(self, run: Run) -> None:
        super().before_fit(run)
        active = {name: layer.mask for name, _, layer in masked_layers(run.model)}
        run.connections = ConnectionLog(active, run.log_every)

    def before_masking(self, run: Run) -> None:
        self.is_due = self.due(run)
        if self.is_due and self.update_replaces_step:
            self._update(run)
            for group in run.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # so the optimiser skips it
        elif self.is_due:
            self.gradients = {n: gradient(w).clone() for n, w, _ in masked_layers(run.model)}

    def after_step(self, run: Run) -> None:
        if self.is_due and not self.update_replaces_step:
            self._update(run)
        none = torch.zeros(0, dtype=torch.int64, device=next(run.model.parameters()).device)
        changes = self.changes or [(none, none) for _ in masked_layers(run.model)]
        assert run.connections is not None
        run.connections.record_by_layer([c[0] for c in changes], [c[1] for c in changes])
        self.changes, self.gradients = [], {}

    def _update(self, run: Run) -> None:
        with torch.no_grad():
            for name, weight, layer in masked_layers(run.model):
                before = self.gradients[name] if name in self.gradients else gradient(weight)
                self.changes.append(self._exchange(run, weight, layer.mask, before))

    def _exchange(
        self, run: Run, weight: Tensor, mask: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update the mask of one layer. Return the pruned and the regrown positions."""
        dropped = self.to_drop(run, require_finite(weight), mask)
        old, count = mask.flatten().clone(), self.grown_count(run, mask, len(dropped))
        mask.view(-1)[dropped] = False
        scores = require_finite(self.growth_scores(run, gradient))
        scores = torch.where(mask, -torch.inf, scores).flatten()
        grown = scores.topk(count).indices
        mask.view(-1)[grown] = True
        new = mask.flatten()
        if not self.restarts_regrown:
            dropped, grown = _positions(old & ~new), _positions(new & ~old)
        weight.view(-1)[dropped] = 0.0
        weight.view(-1)[grown] = NEW_WEIGHT
        velocity = run.optimizer.state[weight].get("momentum_buffer")
        if velocity is not None:
            velocity.view(-1)[torch.cat([dropped, grown])] = 0.0
        return _positions(old & ~new), _positions(new & ~old)


class FlyingBirdStage(DynamicStage):
    """Exchange connections after some steps, fewer and fewer, as Flying Bird does."""

    def __init__(self, params: FlyingBirdParams) -> None:
        super().__init__(params.train)
        self.params = params

    def initial_masks(self, run: Run) -> dict[str, Tensor]:
        counts = quota_keep_counts if self.params.init == "quotas" else erk_keep_counts
        return random_masks(run.model, counts(run.model, run.sparsity), run.generator)

    def due(self, run: Run) -> bool:
        late = run.epoch > self.fit.epochs / 2
        every = self.params.late_update_every if late else self.params.update_every
        return (run.step + 1) % every == 0 and run.step + 1 < run.steps

    def fraction(self, run: Run) -> float:
        falling = (1 + math.cos(math.pi * (run.step + 1) / run.steps)) / 2
        return LOWEST_RATE + (self.params.death_rate - LOWEST_RATE) * falling

    def dropped_count(self, run: Run, mask: Tensor) -> int:
        """Return how many weights a layer drops, rounded up as in the authors' code."""
        return math.ceil(self.fraction(run) * int(mask.sum()))

    def growth_scores(self, run: Run, gradient: Tensor) -> Tensor:
        if self.params.growth == "gradient":
            return gradient.abs()
        return torch.rand(gradient.shape, generator=run.generator, device=gradient.device)


def masked_layers(model: nn.Module) -> list[tuple[str, nn.Parameter, OpenMask]]:
    """Return name, trainable weight and mask of each prunable layer."""
    return [
        (name, trained_weight(module), parametrisation(module, OpenMask))
        for name, module in prunable(model).items()
    ]


def set_masks(run: Run, masks: dict[str, Tensor]) -> None:
    """Replace all masks. The weights and the momentum outside the masks become 0."""
    with torch.no_grad():
        for name, weight, layer in masked_layers(run.model):
            layer.mask.copy_(masks[name])
            weight.mul_(layer.mask)
            velocity = run.optimizer.state[weight].get("momentum_buffer")
            if velocity is not None:
                velocity.mul_(layer.mask)


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)
