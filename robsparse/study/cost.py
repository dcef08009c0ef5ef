"""The cost of a training step in passes of the network over a batch. Imports no torch."""

from collections.abc import Callable

from robsparse.schema.training import Training

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
    """Forward passes, and as many backward passes, that a weight perturbation adds to a step."""
    return PASSES[objective](0)[1]


def passes_per_epoch(objective: str, training: Training) -> float:
    """Forward and backward passes in one epoch, divided by the number of labelled images.

    The passes over the pseudo-labelled or synthetic images of each batch are added.
    """
    extra = training.extra_images(objective)
    step = sum(PASSES[objective](training.crafting.steps))
    step += 2 * perturbation_passes(objective) if training.awp else 0
    return step / (1 - (extra[1] if extra else 0))
