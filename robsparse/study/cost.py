"""The cost of a training step in passes of the network over a batch. Imports no torch."""

from collections.abc import Callable

from robsparse.schema.training import Fit, ScoreTraining, Training

# (forward, backward) passes over a batch in one training step, from the number of crafting steps.
PASSES: dict[str, Callable[[int], tuple[float, float]]] = {
    "natural": lambda steps: (1, 1),
    "at": lambda steps: (steps + 1, steps + 1),
    "mat": lambda steps: (steps / 2 + 1, steps / 2 + 1),
    "trades": lambda steps: (steps + 3, steps + 2),
    "mart": lambda steps: (steps + 2, steps + 2),
    "rst": lambda steps: (steps + 3, steps + 2),
}


def perturbation_passes(objective: str) -> float:
    """Forward passes, and as many backward passes, that a perturbation adds to a step.

    A perturbation is that of weights (AWP) or that of scores (S2AP).
    """
    return PASSES[objective](0)[1]


def passes_per_epoch(objective: str, training: Training, fit: Fit | None = None) -> float:
    """Forward and backward passes in one epoch, divided by the number of labelled images.

    The passes over the pseudo-labelled or synthetic images of each batch are added, and those of
    the perturbations of weights and, for a stage with these settings, of scores. A warm-up without
    a perturbation is not subtracted.
    """
    extra = training.extra_images(objective)
    perturbations = bool(training.awp) + uses_s2ap(fit)
    step = sum(PASSES[objective](training.crafting.steps))
    step += 2 * perturbations * perturbation_passes(objective)
    return step / (1 - (extra[1] if extra else 0))


def uses_s2ap(fit: Fit | None) -> bool:
    """Return whether a stage with these settings perturbs scores."""
    return isinstance(fit, ScoreTraining) and fit.s2ap is not None
