"""Accuracy on images with common corruptions: noise, blur, weather, digital.

A corruption is no adversary: it does not look at the network, and has no eps. Its accuracy is
therefore no part of a robust accuracy. All images count, also those that are misclassified without
a corruption. The mean is over corruptions and severities, each with the same weight.

The images come from files, such as CIFAR-10-C, or are generated here
(`robsparse.datasets._corruptions`). Generated images are not those of CIFAR-10-C, and
their accuracies must not be compared with published ones.

Source: Hendrycks and Dietterich, ICLR 2019 (the corruptions and the files). Differs from the paper:
the mean accuracy is not divided by that of a reference network (no mCE).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robsparse.base.errors import UsageError
from robsparse.datasets import Part
from robsparse.datasets._corruptions import GENERATED
from robsparse.evaluation.tally import correct_flags
from robsparse.schema.evaluation import Evaluation
from robsparse.study.cells import derive_seed

SEVERITIES = (1, 2, 3, 4, 5)
# The corruptions of CIFAR-10-C and CIFAR-100-C; the files of four more are for validation only.
PUBLISHED = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
FROM_FILES, FROM_HERE = "files", "generated corruptions"


@dataclass(frozen=True)
class Corrupted:
    """Which images are classified correctly (bool N), by corruption and severity.

    source: "files" or "generated corruptions"; "" if nothing was measured.
    """

    source: str = ""
    correct: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each corruption and severity, for the record."""
        return [
            {
                "corruption": name,
                "severity": severity,
                "source": self.source,
                "n_correct": int(flags.sum()),
                "n_examples": len(flags),
            }
            for (name, severity), flags in self.correct.items()
        ]

    def outcomes(self) -> dict[str, np.ndarray]:
        """Arrays named corrupted.corruption.severity, for the file of outcomes."""
        return {f"corrupted.{n}.{s}": flags.numpy() for (n, s), flags in self.correct.items()}


def passes(settings: Evaluation) -> int:
    """Return the forward passes for each image: at most, as files have more corruptions."""
    chosen = settings.corruptions
    if chosen is None:
        return 0
    return len(SEVERITIES) * len(PUBLISHED if chosen.folders else GENERATED)


def measure(
    model: nn.Module, examples: Part, settings: Evaluation, dataset: str, device: torch.device
) -> Corrupted:
    """Classify all corrupted versions of the images. The network is in eval mode and stays so.

    Args:
        examples: the first n test images of the data set.
        settings: `corruptions` names the folder of each data set that has files; None: nothing is
            measured.
        dataset: name of the data set in the study.

    Raises:
        UsageError: if a file is missing or damaged, or does not belong to these test images.
    """
    if settings.corruptions is None:
        return Corrupted()
    folder = settings.corruptions.folders.get(dataset)
    images = (
        generated(examples, settings.seed) if folder is None else from_files(Path(folder), examples)
    )
    correct = {
        key: correct_flags(model, Part(x, examples.y_N), settings.batch_size, device)
        for key, x in images
    }
    return Corrupted(FROM_HERE if folder is None else FROM_FILES, correct)


def generated(examples: Part, seed: int) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yield (corruption, severity) and images x_NCHW.

    The random draws depend on the seed, the corruption and the severity alone, so every network
    sees the same images.
    """
    for name, corrupt in GENERATED.items():
        for severity in SEVERITIES:
            random = np.random.default_rng(derive_seed("corruption", name, severity, seed))
            x = corrupt(examples.x_NCHW, severity, random)
            yield (name, severity), (x.clamp(0, 1) * 255).round() / 255


def from_files(folder: Path, examples: Part) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yield (corruption, severity) and images x_NCHW of the files of a folder.

    A file has uint8 images N,H,W,C: all test images in order at severity 1, then at severity 2, and
    so on. labels.npy has their labels.
    """
    n, labels = len(examples), _read(folder / "labels.npy")
    each = len(labels) // len(SEVERITIES)
    for severity in SEVERITIES:
        start = (severity - 1) * each
        found = labels[start : start + n]
        if each < n or not np.array_equal(found, examples.y_N.numpy()):
            raise UsageError(
                f"{folder / 'labels.npy'}: expected the labels of the test images "
                f"{len(SEVERITIES)} times, in order; these are of other images"
            )
    shape = (len(labels), *examples.x_NCHW.shape[2:], examples.x_NCHW.shape[1])
    for name in PUBLISHED:
        path = folder / f"{name}.npy"
        stored = _read(path)
        if stored.dtype != np.uint8 or stored.shape != shape:
            raise UsageError(
                f"{path}: expected uint8 images of shape {shape}, found {stored.dtype} of shape "
                f"{stored.shape}"
            )
        for severity in SEVERITIES:
            start = (severity - 1) * each
            images = np.array(stored[start : start + n]).transpose(0, 3, 1, 2)
            yield (name, severity), torch.from_numpy(np.ascontiguousarray(images)).float() / 255


def _read(path: Path) -> np.ndarray:
    """Open an array of numbers. Nothing is unpickled."""
    try:
        stored: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError) as error:
        raise UsageError(f"{path}: not a readable npy file ({error})") from None
    except Exception:  # of many kinds, if the bytes are random
        raise UsageError(
            f"{path}: expected an npy file with an array of numbers; Python objects are never "
            "unpickled"
        ) from None
    if not isinstance(stored, np.ndarray) or stored.dtype.kind not in "iu":
        raise UsageError(f"{path}: expected an npy file with an array of whole numbers")
    return stored
