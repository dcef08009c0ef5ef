"""Everything that the training of one cell needs. It is prepared before the first step."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import TrainingError, UsageError
from robsparse.compute import randomness
from robsparse.compute.machine import fast_memory_format, pick_precision
from robsparse.datasets import Part, Splits
from robsparse.datasets._arrays import read_extra
from robsparse.fast.proof import IMAGES
from robsparse.fast.structure import runs
from robsparse.networks import construct, weights
from robsparse.records.training_record import check_weights, read_training
from robsparse.schema.evaluation import Selection
from robsparse.schema.training import Training
from robsparse.sparsity.averaging import WeightAverage
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout, derive_seed
from robsparse.study.study import Study
from robsparse.training.batches import Batches
from robsparse.training.checkpoints import Interrupted
from robsparse.training.objectives import Attacker, Objective, make_attacker, make_objective
from robsparse.training.stages import Run, Stage


@dataclass(frozen=True)
class StartingNetwork:
    """The network that a run starts from: its weights and the record of its training.

    All fields are empty if a network is trained from scratch.
    """

    weights: Path | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Session:
    """The fixed parts of one cell's training run.

    Later, only the state inside `run`, the stages and the generator of the attacker changes.
    `held_out` are the images for validation, on the training device. `selections` are those
    whose weights are saved.
    """

    cell: Cell
    layout: Layout
    device: torch.device
    settings: Training
    fingerprint: fingerprints.Fingerprint
    data_checksum: str
    selections: list[Selection]
    batches: Batches
    held_out: Part
    objective: Objective
    attacker: Attacker
    start: StartingNetwork
    run: Run
    stages: list[Stage]
    method_path: Path


def prepare_session(study: Study, cell: Cell, layout: Layout, device: torch.device) -> Session:
    """Read the data, and make the network, the objective, the attacker and the stages of a cell.

    Raises:
        UsageError: if data or starting weights are missing or do not fit.
        TrainingError: if the file of the method has an error.
    """
    planned = study.planned[cell]
    fingerprint = fingerprints.training(study, cell)
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    if not len(splits.train):
        raise UsageError(f"datasets.{cell.dataset}: it has no training images to train on")
    extra = _read_extra_images(cell, planned.training, splits)
    crafting = _generator(device, cell, "craft", cell.dataset, cell.objective)
    attacker = make_attacker(planned, crafting)
    start = _read_start(study, cell, layout)
    run = _prepare_run(study, cell, splits, start, device)
    memory_format = pick_memory_format(run, splits.train, device)
    batches = Batches(cell, planned, splits.train, extra, device, memory_format=memory_format)
    method = study.entry("method", cell.method)
    return Session(
        cell=cell,
        layout=layout,
        device=device,
        settings=planned.training,
        fingerprint=fingerprint,
        data_checksum=splits.checksum(),
        selections=study.saved_selections(),
        batches=batches,
        held_out=splits.validation.to(device),
        objective=make_objective(cell.objective, planned.training),
        attacker=attacker,
        start=start,
        run=run,
        stages=make_stages(study, cell, method.path),
        method_path=method.path,
    )


def _generator(device: torch.device, cell: Cell, *axes: str) -> torch.Generator:
    """Return a generator on the device, with a seed that depends on `axes` and the cell's seed."""
    return torch.Generator(device).manual_seed(derive_seed(*axes, cell.seed))


def _read_extra_images(cell: Cell, settings: Training, splits: Splits) -> Part | None:
    """Return the pseudo-labelled or synthetic images that training uses, or None."""
    extra = settings.extra_images(cell.objective)
    return extra and read_extra(Path(extra[0]), splits.image_shape, splits.classes)


def _read_start(study: Study, cell: Cell, layout: Layout) -> StartingNetwork:
    """Return the last weights and the training record of the cell that this cell starts from."""
    start = study.starting_cell(cell)
    if start is None:
        return StartingNetwork()
    path = layout.model(start, "last")
    if not path.exists():
        raise UsageError(
            f"{path}: the weights that '{cell.method}' starts from are missing; "
            f"train --cell {start.key} first"
        )
    record = read_training(layout.training(start))
    check_weights(layout.training(start), "last", path)
    return StartingNetwork(path, record["curve"], record["cost"], record["failure"])


def _prepare_run(
    study: Study, cell: Cell, splits: Splits, start: StartingNetwork, device: torch.device
) -> Run:
    """Return the initial network, with the other values that hooks of a stage can read."""
    settings, method = study.planned[cell].training, study.base("method", cell.method)
    model = _initial_network(study, cell, splits, start).to(device)
    return Run(
        model=model,
        sparsity=cell.sparsity,
        # Variants of a method use the same seed, so that only their settings make a difference.
        generator=_generator(device, cell, "method", method, cell.sparsity_text),
        arch=study.base("arch", cell.arch),
        precision=pick_precision(settings.precision, device),
        log_every=settings.log_every,
        awp=settings.awp,
        sparse_compute=settings.sparse_compute == "auto",
        average=WeightAverage(model, settings.ema.decay) if settings.ema else None,
    )


def _initial_network(study: Study, cell: Cell, splits: Splits, start: StartingNetwork) -> nn.Module:
    """Return the initial network. Its weights depend only on arch and seed, not on the method."""
    randomness.seed(derive_seed("init", cell.arch, cell.seed))
    model = construct.build(study, cell, splits.image_shape, splits.classes)
    if start.weights is not None:
        weights.load_into(model, start.weights)
    return model


def pick_memory_format(run: Run, train: Part, device: torch.device) -> torch.memory_format:
    """Return the fast memory format for the precision, if the code of the network accepts it."""
    fast = fast_memory_format(run.precision)
    x_NCHW = train.x_NCHW[:IMAGES].to(device)
    changed_NCHW = x_NCHW.contiguous(memory_format=fast)
    accepted = changed_NCHW is x_NCHW or runs(run.model, changed_NCHW)
    return fast if accepted else torch.contiguous_format


def make_stages(study: Study, cell: Cell, path: Path) -> list[Stage]:
    """Return the stages of the method of a cell. `path`: the file of the method.

    Raises:
        TrainingError: if the file of the method has an error.
    """
    try:
        module = registry.load("method", study.base("method", cell.method))
    except (
        UsageError
    ) as error:  # the error is in the file of the method, not in the input of the user
        raise TrainingError(f"{cell.key}: {error}") from error
    with method_errors(cell, path):
        return module.stages(study.planned[cell].params)


@contextmanager
def method_errors(cell: Cell, path: Path) -> Iterator[None]:
    """Turn an error in the file of the method into a TrainingError of one line with its place."""
    try:
        yield
    except (TrainingError, UsageError, Interrupted, OSError):
        raise
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == str(path)]
        if not lines:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise TrainingError(f"{cell.key}: {path}, line {lines[-1]}: {reason}") from error


@contextmanager
def stage_errors(session: Session, stage: Stage) -> Iterator[None]:
    """Like `method_errors`. Also add the cell, the stage and the epoch to a TrainingError."""
    with method_errors(session.cell, session.method_path):
        try:
            yield
        except TrainingError as error:
            place = f"stage {stage.name}, epoch {session.run.epoch + 1}"
            raise TrainingError(
                f"{session.cell.key}: {error} in {place}; a smaller lr may help"
            ) from error
