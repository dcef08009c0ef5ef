"""The inputs of one evaluation: the network, the images, and the paths of the results."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from robsparse import datasets
from robsparse.base.errors import UsageError
from robsparse.base.files import check_writable
from robsparse.datasets import Part, Splits
from robsparse.networks import construct, external
from robsparse.schema.evaluation import Selection
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout
from robsparse.study.fingerprints import Fingerprint
from robsparse.study.study import Study
from robsparse.study.targets import Target


@dataclass(frozen=True)
class Job:
    """One evaluation. All its inputs are resolved before the first attack.

    model: the attacked network, in eval mode, on `device`.
    origin: a text that says where the network comes from.
    weights: the file of its weights, or None if code builds the network with weights.
    examples: the attacked test images.
    splits: the whole data set.
    record, outcomes: the files of the results.
    cache: the folder of the cache.
    training: the training record of the study, or None if other weights are attacked.
    surrogate: surrogate(method) returns the network of another cell, on `device`.
    """

    study: Study
    cell: Cell
    selection: Selection
    fingerprint: Fingerprint
    device: torch.device
    splits: Splits
    examples: Part
    model: nn.Module
    origin: str
    weights: Path | None
    record: Path
    outcomes: Path
    cache: Path
    training: Path | None
    surrogate: Callable[[str], nn.Module]


def resolve(
    study: Study,
    cell: Cell,
    selection: Selection,
    layout: Layout,
    *,
    target: Target | None,
    device: torch.device,
) -> Job:
    """Load and check everything that an evaluation needs.

    Args:
        study, cell, selection, layout: the network, and the paths of its files.
        target: other weights with other result files, or None.
        device: the device of the evaluation.

    Raises:
        UsageError: if weights are missing or damaged, the images are not what an attack expects,
            the network does not map them to logits, or results cannot be written.
    """
    files = target or Target.in_study(layout, cell, selection)
    fingerprint = fingerprints.evaluation(study, cell, selection)
    check_writable(files.record.parent)
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    if target is None:
        model, origin = external.load_network(study, cell, splits, layout, selection)
    else:
        model = construct.with_weights(study, cell, splits, target.weights, target.match)
        origin = str(study.source(cell.method))
    examples = first_examples(splits.test, study.evaluation.n_examples, splits.classes)
    model = model.to(device).eval()
    construct.check_network(model, examples.x_NCHW[:2].to(device), splits.classes)
    return Job(
        study,
        cell,
        selection,
        fingerprint,
        device,
        splits,
        examples,
        model,
        origin,
        weights=files.weights,
        record=files.record,
        outcomes=files.flags,
        cache=files.cache,
        training=layout.training(cell) if target is None else None,
        surrogate=surrogates(study, cell, selection, layout, device),
    )


def surrogates(
    study: Study, cell: Cell, selection: Selection, layout: Layout, device: torch.device
) -> Callable[[str], nn.Module]:
    """Return surrogate(method), which loads the network of another cell for transfer to `cell`."""

    @functools.cache
    def surrogate(method: str) -> nn.Module:
        other = study.surrogate(cell, method)
        splits = datasets.load(study.base("dataset", other.dataset), study.datasets[other.dataset])
        model, _ = external.load_network(study, other, splits, layout, selection)
        return model.to(device).eval()

    return surrogate


def first_examples(test: Part, n: int, classes: int) -> Part:
    """Return the first n test images.

    Raises:
        UsageError: unless there are n images, in [0,1] and with valid labels.
    """
    if n > len(test):
        raise UsageError(f"evaluation.n_examples = {n}: the test split has {len(test)} images")
    part = Part(test.x_NCHW[:n], test.y_N[:n])
    low, high = float(part.x_NCHW.min()), float(part.x_NCHW.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(f"test images: expected values in [0,1], found [{low:g}, {high:g}]")
    if int(part.y_N.min()) < 0 or int(part.y_N.max()) >= classes:
        raise UsageError(f"test labels: expected 0..{classes - 1}")
    return part
