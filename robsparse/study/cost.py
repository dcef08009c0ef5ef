"""What a training step costs, in passes of the network over its batch. No torch in here."""

from collections.abc import Callable

from robsparse.schema.training import Training

# Forward and backward passes over a batch that one step of each objective costs.
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
    """Forward and backward passes over each labelled training image in one epoch.

    The passes over pseudo-labelled or synthetic images that batches mix in are counted as well.
    """
    extra = training.extra_images(objective)
    step = sum(PASSES[objective](training.crafting.steps))
    step += 2 * perturbation_passes(objective) if training.awp else 0
    return step / (1 - (extra[1] if extra else 0))
