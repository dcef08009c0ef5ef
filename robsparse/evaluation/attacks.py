"""The interface of an attack: its inputs and its result.

An attack is a file in eval/ with a class `Params` (a subclass of `AttackParams` if the attack
perturbs images) and

    def run(model, x_NCHW, y_N, params, context: AttackContext) -> Outcome
    def passes(params) -> tuple[int, int]

`run` gets the images that the model classifies correctly (`clean` gets all images). `passes`
returns two numbers for an image that stays robust: the passes forward and backward, and the passes
forward only. `robsparse plan` estimates times from them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robsparse.evaluation.cache import Cache


def no_surrogate(method: str) -> nn.Module:
    """Raise LookupError. This is the default `surrogate`, without any other network."""
    raise LookupError(f"there is no network '{method}'")


@dataclass(frozen=True)
class AttackContext:
    """The threat, the device and the services of one attack.

    norm, eps: the threat.
    seed: the seed of all random numbers of the attack.
    report: report(text) prints a line of progress.
    cache: stores finished batches of a long attack.
    surrogate: surrogate(method) returns another network of the study, in eval mode, for black-box
        transfer attacks.
    images: all test images x_NCHW of the evaluation, also the misclassified ones.
    """

    norm: str
    eps: float
    seed: int
    batch_size: int
    device: torch.device
    report: Callable[[str], None] = print
    cache: Cache = Cache(None)  # noqa: RUF009 (it is immutable)
    surrogate: Callable[[str], nn.Module] = no_surrogate
    images: Tensor | None = None


class Picture(NamedTuple):
    """An adversarial image x_CHW and the class that the network predicts for it."""

    image: Tensor
    predicted: int


@dataclass(frozen=True)
class Outcome:
    """The result of an attack.

    components: for each component, the images that are robust to it and to all components before
        it (bool N), in the order of the run. The last entry is the result of the whole attack.
    settings: the columns steps, restarts and version of a result row, where they apply.
    warnings: sentences that say why the attack may be unreliable.
    max_perturbation: largest distance of an adversarial image in the norm of the threat, or None.
    nan_count: pixels of adversarial images that are not a number.
    distances: for an attack that searches for the smallest perturbation: the length of this
        perturbation for each image (float N, inf if none was found).
    pictures: adversarial versions of some of the first images, by image index.
    earlier_seconds: the time of an earlier, interrupted run for the results from the cache.
    """

    components: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    max_perturbation: float | None = None
    nan_count: int = 0
    distances: Tensor | None = None
    pictures: dict[int, Picture] = field(default_factory=dict)
    earlier_seconds: float = 0.0

    def arrays(self, seconds: float) -> dict[str, np.ndarray]:
        """Return the outcome as arrays for the cache. seconds: the duration of the attack."""
        words = {
            "settings": self.settings,
            "warnings": self.warnings,
            "max_perturbation": self.max_perturbation,
            "nan_count": self.nan_count,
            "components": list(self.components),
            "seconds": seconds,
        }
        found = {f"flags{i}": f.cpu().numpy() for i, f in enumerate(self.components.values())}
        if self.distances is not None:
            found["distances"] = self.distances.numpy()
        return {"words": np.array(json.dumps(words)), **found, **arrays_of_pictures(self.pictures)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Outcome":
        """Return the outcome from its arrays. The stored time becomes `earlier_seconds`."""
        words = json.loads(str(arrays["words"]))
        names, seconds = words.pop("components"), words.pop("seconds")
        lengths = arrays.get("distances")
        return cls(
            {name: torch.from_numpy(arrays[f"flags{i}"]) for i, name in enumerate(names)},
            **words,
            distances=None if lengths is None else torch.from_numpy(lengths),
            pictures=pictures_from_arrays(arrays),
            earlier_seconds=seconds,
        )


def outcome_from_distances(distances: Tensor, eps: float, settings: dict[str, Any]) -> Outcome:
    """Return the outcome of an attack with the smallest perturbations (float N, inf: none)."""
    robust = distances > eps
    return Outcome(
        {"all": robust},
        settings,
        max_perturbation=max(distances[~robust].tolist(), default=0.0),
        distances=distances,
    )


def arrays_of_pictures(pictures: dict[int, Picture]) -> dict[str, np.ndarray]:
    """Return pictures as arrays for the cache, with pixels in half precision."""
    images = [picture.image for picture in pictures.values()]
    return {
        "pictured": np.array(list(pictures), dtype=np.int64),
        "predicted": np.array([p.predicted for p in pictures.values()], dtype=np.int64),
        "pictures": torch.stack(images).half().numpy() if images else np.zeros(0, np.float16),
    }


def pictures_from_arrays(arrays: dict[str, np.ndarray]) -> dict[int, Picture]:
    """Return the pictures from their arrays."""
    images = torch.from_numpy(arrays["pictures"]).float()
    found = map(Picture, images, arrays["predicted"].tolist())
    return dict(zip(arrays["pictured"].tolist(), found, strict=True))
