"""Benchmark of the batches of training images."""

from collections.abc import Iterator

import numpy as np
import torch

from robsparse.datasets import Part
from robsparse.schema.imagesets import Augmentation
from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import CLASSES, Settings
from robsparse.tools.stopwatch import Comparison, Side, copy_rate
from robsparse.training import augment
from robsparse.training.batches import Source, Stored

EPOCH = 2000  # images of the case


def data(settings: Settings) -> Iterator[Comparison]:
    """An epoch of cropped and flipped 32x32 images."""
    textbook, size = sides.load_textbook(), settings.batch_size
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (EPOCH, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, EPOCH)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    stored = Stored.from_part(Part(x, torch.from_numpy(labels)), settings.device)
    augmentation = Augmentation(kind="crop", flip=True)

    def ours() -> None:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(EPOCH, generator=generator).to(settings.device)
        draws = augment.draw(EPOCH, augmentation, generator).to(settings.device)
        source = Source(stored, order, draws, augmentation, size, settings.device)
        for step in range(EPOCH // size):
            source.batch(step)

    def theirs() -> None:
        for images_NCHW, _ in textbook.batches(images, labels, size, 0):
            images_NCHW.to(settings.device)

    # A byte is read and a number written for each value.
    limit = copy_rate(settings.device) / (5 * x[0].numel())
    if settings.wants("data 32x32"):
        yield settings.watch.compare(
            "data 32x32", Side(ours), Side(theirs), "textbook", count=EPOCH, limit=limit
        )
