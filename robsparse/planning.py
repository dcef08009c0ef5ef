"""What a study would run, and how long that takes on this machine, from a few timed passes."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from robsparse import datasets, models, objectives, registry
from robsparse.cells import Cell, Layout
from robsparse.config import Study
from robsparse.datasets import Splits
from robsparse.machine import device_name, pick_device, set_threads

# Shares that are not known before the study is run; the estimate says so.
ROBUST_SHARE = 0.7
SECONDS_TO_START_A_JOB = 4.0


class Clock:
    """Seconds for the passes of one (dataset, arch, objective), timed once and then reused."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.device = pick_device(study.machine.device)
        self.splits: dict[str, Splits] = {}
        self.timed: dict[tuple[str, ...], float] = {}

    def data(self, cell: Cell) -> Splits:
        """The splits of the cell's data set."""
        if cell.dataset not in self.splits:
            params = self.study.datasets[cell.dataset]
            self.splits[cell.dataset] = datasets.load(cell.dataset, params)
        return self.splits[cell.dataset]

    def step(self, cell: Cell) -> float:
        """One training step of the dense network."""
        objective = objectives.of_study(self.study, cell.objective)
        training = self.study.training
        attacker = objectives.Attacker(
            self.study.threat.eps, training.crafting, torch.Generator(self.device)
        )
        size = min(training.batch_size, len(self.data(cell).train))
        return self._time(
            ("step", cell.dataset, cell.arch, cell.objective),
            cell,
            size,
            lambda model, x, y: objective(model, x, y, attacker).backward(),
        )

    def gradient(self, cell: Cell) -> float:
        """Forward and backward pass of one evaluation batch."""
        return self._time(
            ("gradient", cell.dataset, cell.arch),
            cell,
            self.study.evaluation.n_examples,
            lambda model, x, y: model(x.requires_grad_(True)).sum().backward(),
        )

    def forward(self, cell: Cell) -> float:
        """Forward pass of one evaluation batch."""
        return self._time(
            ("forward", cell.dataset, cell.arch),
            cell,
            self.study.evaluation.n_examples,
            lambda model, x, y: model(x.detach()),
        )

    def _time(self, key: tuple[str, ...], cell: Cell, size: int, work: Callable) -> float:
        if key not in self.timed:
            splits = self.data(cell)
            params = self.study.archs[cell.arch]
            model: nn.Module = models.build(
                cell.arch, params, splits.image_shape, splits.classes
            ).to(self.device)
            x = torch.rand(min(size, self.study.evaluation.batch_size), *splits.image_shape)
            x, y = x.to(self.device), torch.zeros(len(x), dtype=torch.int64, device=self.device)
            self.timed[key] = _median_seconds(lambda: work(model, x, y), self.device)
        return self.timed[key]


def describe(study: Study, layout: Layout, cores: int) -> str:
    """One line a cell with its state and estimated seconds, then the total."""
    set_threads(study.machine.threads)
    clock = Clock(study)
    lines = [
        f"{study.title}: {len(study.cells())} networks, "
        f"{len(study.cells()) * len(study.evaluation.selections)} evaluations",
        "",
    ]
    total = longest = 0.0
    for cell in study.cells():
        training = 0.0 if layout.training(cell).exists() else training_seconds(clock, cell)
        evaluation = sum(
            0.0
            if layout.evaluation(cell, selection).exists()
            else evaluation_seconds(clock, cell, selection)
            for selection in study.evaluation.selections
        )
        total += training + evaluation
        longest = max(longest, training + evaluation)
        lines.append(f"{cell.key:60s} train {_text(training)}   attack {_text(evaluation)}")
    at_once = max(1, cores // study.machine.threads)
    wall = max(total / at_once, longest)
    lines += [
        "",
        f"about {wall / 60:.0f} min with {cores} cores, {at_once} jobs at a time, on "
        f"{device_name(clock.device)}; assumes that {ROBUST_SHARE:.0%} of the images survive "
        "each attack",
        f"start it: snakemake --cores {cores}",
    ]
    return "\n".join(lines)


def training_seconds(clock: Clock, cell: Cell) -> float:
    """Estimated training time of a cell, without that of the cell it starts from."""
    study = clock.study
    method = registry.load("method", cell.method)
    epochs = sum(s.fit.epochs for s in method.stages(study.methods[cell.method], cell.sparsity))
    examples = len(clock.data(cell).train)
    steps = max(1, examples // study.training.batch_size)
    return SECONDS_TO_START_A_JOB + epochs * steps * clock.step(cell)


def evaluation_seconds(clock: Clock, cell: Cell, selection: str) -> float:
    """Estimated time of all attacks on one set of weights."""
    settings = clock.study.evaluation
    batches = math.ceil(settings.n_examples / settings.batch_size) * ROBUST_SHARE
    seconds = SECONDS_TO_START_A_JOB
    for name in settings.selections[selection]:
        gradients, forwards = registry.load("attack", name).passes(settings.attacks[name])
        seconds += batches * (gradients * clock.gradient(cell) + forwards * clock.forward(cell))
    return seconds


def _median_seconds(work: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _text(seconds: float) -> str:
    return "    done" if seconds == 0 else f"{seconds:6.0f} s"
