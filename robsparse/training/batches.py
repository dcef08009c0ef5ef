"""Training batches. Their order, augmentation and extra images depend only on seed and epoch.

Every method sees the same batches. A resumed run sees the same batches as an uninterrupted run.
The images are stored on the training device as bytes. Each batch is converted to floats, shifted
and flipped when it is used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from robsparse.datasets import Part
from robsparse.schema.imagesets import Augmentation
from robsparse.study.cells import Cell, derive_seed
from robsparse.study.planned import PlannedCell
from robsparse.training import augment

LEVELS = (255, 16)  # the largest pixel values of photographs and of the 8x8 digits
SHARE_OF_MEMORY = 0.5  # the largest share of free GPU memory that images may use


@dataclass(frozen=True)
class Stored:
    """Images and labels in memory.

    x_NCHW: uint8 in 0..levels for values in [0,1], or floats in [0,1] if levels is None.
    """

    x_NCHW: Tensor
    y_N: Tensor
    levels: int | None

    @classmethod
    def from_part(cls, part: Part, device: torch.device) -> "Stored":
        """Store images as bytes if this is exact, and on the device if they fit into its memory."""
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
        """Return the images x_NCHW in [0,1] at these indices, and their labels y_N."""
        x_NCHW = self.x_NCHW[index]
        return x_NCHW if self.levels is None else x_NCHW.float() / self.levels, self.y_N[index]


@dataclass(frozen=True)
class Source:
    """Labelled or extra images, in the order and with the augmentation of one epoch."""

    stored: Stored
    order: Tensor
    draws: augment.Draws
    augmentation: Augmentation
    size: int
    device: torch.device

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a step, on the device: x_NCHW in [0,1], y_N."""
        index = self.order[step * self.size : (step + 1) * self.size]
        x_NCHW, y_N = self.stored[index.to(self.stored.y_N.device)]
        x_NCHW, y_N = x_NCHW.to(self.device), y_N.to(self.device)
        return augment.apply(x_NCHW, self.draws[index], self.augmentation), y_N


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch: labelled images, followed by extra images if there are any."""

    sources: list[Source]
    memory_format: torch.memory_format

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step: x_NCHW in [0,1] in the memory format, y_N."""
        images, labels = zip(*(source.batch(step) for source in self.sources), strict=True)
        return torch.cat(images).contiguous(memory_format=self.memory_format), torch.cat(labels)


class Batches:
    """The batches of one cell's training run.

    train: labelled images. An epoch uses each image once and drops the last partial batch.
    extra: pseudo-labelled or synthetic images, or None. The settings give their share of a batch.
    device, memory_format: the device and the memory format of the batches.
    """

    def __init__(
        self,
        cell: Cell,
        planned: PlannedCell,
        train: Part,
        extra: Part | None,
        device: torch.device,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.cell, self.device, self.memory_format = cell, device, memory_format
        self.train = Stored.from_part(train, device)
        self.extra = Stored.from_part(extra, device) if extra is not None else None
        training, self.augmentation = planned.training, planned.augmentation
        size = min(training.batch_size, len(train))
        settings = training.extra_images(cell.objective) if extra is not None else None
        self.extra_size = int(size * settings[1]) if settings else 0
        self.size = size - self.extra_size
        self.steps = len(train) // self.size

    def epoch(self, index: int) -> Epoch:
        """Return the batches of an epoch. `index` counts from 0 over all stages of the run."""
        sources = [self._source("order", self.train, self.size, index)]
        if self.extra is not None and self.extra_size:
            sources.append(self._source("extra", self.extra, self.extra_size, index))
        return Epoch(sources, self.memory_format)

    def _source(self, name: str, stored: Stored, size: int, epoch: int) -> Source:
        device = self.device
        axes = (self.cell.dataset, self.cell.seed, epoch)
        generator = torch.Generator().manual_seed(derive_seed(name, *axes))
        needed, order = self.steps * size, torch.randperm(len(stored), generator=generator)
        while len(order) < needed:  # repeat the extra images if an epoch needs more
            order = torch.cat([order, torch.randperm(len(stored), generator=generator)])
        generator = torch.Generator().manual_seed(derive_seed("augment", name, *axes))
        draws = augment.draw(len(stored), self.augmentation, generator).to(device)
        return Source(stored, order[:needed].to(device), draws, self.augmentation, size, device)
