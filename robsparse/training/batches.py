"""Training batches: their order, augmentation and extra images, decided by seed and epoch alone.

Every method sees the same batches, and a resumed run sees those that it would have seen. Images lie
on the training device as bytes and become numbers, shifted and flipped, a batch at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from robsparse.datasets import Part
from robsparse.schema.imagesets import Augmentation
from robsparse.study.cells import Cell, derive_seed
from robsparse.study.study import Study
from robsparse.training import augment

LEVELS = (255, 16)  # grey levels of a pixel above 0: of photographs, of the digits
SHARE_OF_MEMORY = 0.5  # of what is free on a GPU, for images to be kept there


@dataclass(frozen=True)
class Stored:
    """Images and labels where training takes them from.

    x_NCHW: uint8 of 0..levels that stand for [0,1], or the numbers themselves if levels is None.
    """

    x_NCHW: Tensor
    y_N: Tensor
    levels: int | None

    @classmethod
    def of(cls, part: Part, device: torch.device) -> "Stored":
        """As bytes if these are exact, on the device if its memory has room for them."""
        x_NCHW, levels = part.x_NCHW, None
        for number in LEVELS:
            whole = (part.x_NCHW * number).round()
            if torch.equal(whole / number, part.x_NCHW):
                x_NCHW, levels = whole.to(torch.uint8), number
                break
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if x_NCHW.nbytes > SHARE_OF_MEMORY * free:
                print(
                    f"data: {x_NCHW.nbytes / 2**20:.0f} MB of images stay off the GPU", flush=True
                )
                device = x_NCHW.device
        return cls(x_NCHW.to(device), part.y_N.to(device), levels)

    def __len__(self) -> int:
        return len(self.y_N)

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Chosen images x_NCHW in [0,1] and their labels y_N."""
        x_NCHW = self.x_NCHW[index]
        return x_NCHW if self.levels is None else x_NCHW.float() / self.levels, self.y_N[index]


@dataclass(frozen=True)
class Source:
    """Images of one kind, in the order and with the augmentation of one epoch."""

    stored: Stored
    order: Tensor
    draws: augment.Draws
    augmentation: Augmentation
    size: int
    device: torch.device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Its share of the batch at a step, on the device: x_NCHW in [0,1], y_N."""
        index = self.order[step * self.size : (step + 1) * self.size]
        x_NCHW, y_N = self.stored[index.to(self.stored.y_N.device)]
        x_NCHW, y_N = x_NCHW.to(self.device), y_N.to(self.device)
        return augment.apply(x_NCHW, self.draws[index], self.augmentation), y_N


class Batches:
    """The batches of one cell's training run.

    train: labelled images; an epoch goes through them once, the last partial batch is dropped.
    extra: pseudo-labelled images that fill the share `rst_fraction` of each batch, or None.
    device: where batches are wanted.
    """

    def __init__(
        self, study: Study, cell: Cell, train: Part, extra: Part | None, device: torch.device
    ) -> None:
        self.cell, self.device = cell, device
        self.train = Stored.of(train, device)
        self.extra = Stored.of(extra, device) if extra is not None else None
        training = study.training_of(cell)
        self.augmentation = training.augmentation or study.datasets[cell.dataset].augmentation
        size = min(training.batch_size, len(train))
        self.extra_size = int(size * training.rst_fraction) if extra else 0
        self.size = size - self.extra_size
        self.steps = len(train) // self.size

    def epoch(self, index: int) -> list[Source]:
        """Where the batches of an epoch come from: labelled images, then extra ones if any."""
        sources = [self._source("order", self.train, self.size, index)]
        if self.extra is not None and self.extra_size:
            sources.append(self._source("extra", self.extra, self.extra_size, index))
        return sources

    def _source(self, name: str, stored: Stored, size: int, epoch: int) -> Source:
        device = self.device
        axes = (self.cell.dataset, self.cell.seed, epoch)
        generator = torch.Generator().manual_seed(derive_seed(name, *axes))
        needed, order = self.steps * size, torch.randperm(len(stored), generator=generator)
        while len(order) < needed:  # fewer extra images than an epoch takes: go round again
            order = torch.cat([order, torch.randperm(len(stored), generator=generator)])
        generator = torch.Generator().manual_seed(derive_seed("augment", name, *axes))
        draws = augment.draw(len(stored), self.augmentation, generator).to(device)
        return Source(stored, order[:needed].to(device), draws, self.augmentation, size, device)


def mixed(sources: list[Source], step: int) -> tuple[Tensor, Tensor]:
    """The whole batch at a step of an epoch: x_NCHW in [0,1], y_N."""
    images, labels = zip(*(source.batch(step) for source in sources), strict=True)
    return torch.cat(images), torch.cat(labels)
