"""Helpers of attacks: batches that fit into memory, a tally of robust images, progress."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from robsparse.compute import perturb
from robsparse.compute.machine import is_out_of_memory
from robsparse.datasets import Part
from robsparse.evaluation.attacks import (
    AttackContext,
    Outcome,
    Picture,
    arrays_of_pictures,
    pictures_from_arrays,
)

SECONDS_BETWEEN_LINES = 10.0
PICTURES = 32  # adversarial versions of this many first images are stored for the figures


class Tally:
    """The robust images of a running attack, and the perturbations so far.

    robust: which images are still robust (bool N).
    largest: length of the longest perturbation.
    nans: the number of pixels that are not a number.
    pictures: adversarial versions of some of the first images.
    """

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, context: AttackContext) -> None:
        self.x_NCHW, self.y_N, self.context = x_NCHW, y_N, context
        self.robust = torch.ones(len(y_N), dtype=torch.bool)
        self.largest, self.nans = 0.0, 0
        self.began, self.earlier = time.monotonic(), 0.0
        self.pictures: dict[int, Picture] = {}

    def attack(
        self,
        model: nn.Module,
        craft: Callable[[Tensor, Tensor, Tensor], Tensor],
        among: Tensor | None = None,
    ) -> None:
        """Test the model on craft(x, y, index), batch by batch.

        among: indices of the images to attack (int); None for all images.
        """
        context = self.context
        among = torch.arange(len(self.y_N)) if among is None else among

        def attack_batch(where: slice) -> None:
            index = among[where]
            x, y = self.x_NCHW[index].to(context.device), self.y_N[index].to(context.device)
            self.record(model, index, craft(x, y, index))

        in_batches(len(among), context.batch_size, attack_batch, context.report)

    def record(self, model: nn.Module, where: slice | Tensor, adversarial: Tensor) -> None:
        """Record which images at `where` are broken by their adversarial versions."""
        index = torch.arange(len(self.y_N))[where]
        with torch.no_grad():
            predicted = model(adversarial).argmax(1).cpu()
        broken = (predicted != self.y_N[index]).nonzero().squeeze(1)
        found = adversarial.detach().cpu()
        change = perturb.length(found - self.x_NCHW[index], self.context.norm)
        self.nans += int(found.isnan().sum())
        self.largest = max([self.largest, *change.nan_to_num(0.0).tolist()])
        for i in broken.tolist():
            if int(index[i]) < PICTURES:
                self.pictures[int(index[i])] = Picture(found[i], int(predicted[i]))
        self.robust[index[broken]] = False

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the tally as arrays for the cache."""
        return {
            "robust": self.robust.numpy(),
            "numbers": np.array([self.largest, self.nans, self.seconds()], dtype=np.float64),
            **arrays_of_pictures(self.pictures),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue from the arrays of an earlier tally."""
        self.robust = torch.from_numpy(arrays["robust"])
        largest, nans, self.earlier = arrays["numbers"].tolist()
        self.largest, self.nans = largest, int(nans)
        self.pictures = pictures_from_arrays(arrays)
        self.began = time.monotonic()

    def seconds(self) -> float:
        """Return the time so far, including earlier runs."""
        return self.earlier + time.monotonic() - self.began

    def outcome(
        self,
        settings: dict[str, Any],
        components: dict[str, Tensor] | None = None,
        warnings: list[str] | None = None,
    ) -> Outcome:
        """Return the outcome of the attack."""
        return Outcome(
            components or {"all": self.robust},
            settings,
            warnings or [],
            max_perturbation=self.largest,
            nan_count=self.nans,
            pictures=self.pictures,
            earlier_seconds=self.earlier,
        )


class AttackProgress:
    """Shows the finished images, the robust images, and the remaining time.

    A terminal shows a progress bar. A log gets a line every few seconds and a line at the end.
    """

    def __init__(self, name: str, total: int, report: Callable[[str], None]) -> None:
        self.name, self.total, self.report = name, total, report
        self.began = self.reported = time.monotonic()
        self.bar = tqdm(total=total, desc=name, unit="image", disable=None, leave=False)

    def update(self, done: int, robust: int) -> None:
        """Show that `done` images are finished and `robust` images are still robust."""
        self.bar.update(done - self.bar.n if not self.bar.disable else 0)
        self.bar.set_postfix_str(f"{robust} robust")
        now = time.monotonic()
        if self.bar.disable and done < self.total and now - self.reported > SECONDS_BETWEEN_LINES:
            self.reported = now
            rest = (now - self.began) / max(done, 1) * (self.total - done)
            self.report(
                f"{self.name}: {done} of {self.total} images, {robust} still robust, "
                f"{now - self.began:.0f} s, about {rest:.0f} s left"
            )

    def close(self, robust: int, of: int) -> None:
        """Print the last line."""
        self.bar.close()
        seconds = time.monotonic() - self.began
        self.report(f"{self.name}: {robust} of {of} still robust, {seconds:.1f} s")


def in_batches(
    count: int, size: int, work: Callable[[slice], None], report: Callable[[str], None]
) -> None:
    """Call work(range) for consecutive ranges of at most `size` of `count` images.

    If memory is not sufficient, the size of all further ranges is halved, and a line reports this.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            work(slice(start, stop))
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size = max(1, min(size, stop - start) // 2)
            _free_memory()
            report(f"out of memory: batches of {size} images from here on")
        else:
            start = stop


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def correct_flags(
    model: nn.Module,
    part: Part,
    size: int,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> Tensor:
    """Return which images the model classifies correctly (bool N, on the CPU)."""
    flags = torch.zeros(len(part), dtype=torch.bool)

    def classify(where: slice) -> None:
        with torch.no_grad():
            predicted = model(part.x_NCHW[where].to(device)).argmax(1).cpu()
        flags[where] = predicted == part.y_N[where]

    in_batches(len(part), size, classify, report)
    return flags
