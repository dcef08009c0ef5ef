"""Lists the jobs of a study and estimates their time from a few timed passes on this machine."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Hashable
from shlex import quote
from typing import Any

import torch
from torch import Tensor, nn

from robsparse import datasets
from robsparse.base import registry
from robsparse.compute.machine import computing, device_name, pick_device, pick_precision, prepare
from robsparse.evaluation import corruptions, sanity_checks
from robsparse.fast import folding
from robsparse.networks import construct
from robsparse.schema.evaluation import Selection
from robsparse.schema.imagesets import Description
from robsparse.study.cells import Cell, Layout
from robsparse.study.cost import PASSES, perturbation_passes, uses_s2ap
from robsparse.study.study import Study
from robsparse.training import objectives

# Share of images that survive an attack. It is not known before the study has run; the output
# names this assumption.
ROBUST_SHARE = 0.7
SECONDS_TO_START_A_JOB = 4.0
ENOUGH_SECONDS = 0.1  # shortest duration of a pass that is timed well


class Clock:
    """Measures seconds for each image and pass; cells with the same passes share a measurement."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.device = pick_device(study.machine.device)
        self.timed: dict[tuple[Hashable, ...], float] = {}

    @functools.cache  # noqa: B019 (a clock lives as long as the command)
    def data(self, dataset: str) -> Description:
        """Return shape and sizes of a data set; it is downloaded only if they are not known."""
        return datasets.describe(self.study.base("dataset", dataset), self.study.datasets[dataset])

    def step(self, cell: Cell) -> float:
        """Return seconds for each image in a training step of the dense network."""
        planned = self.study.planned[cell]
        training = planned.training
        objective = objectives.make_objective(cell.objective, training)
        attacker = objectives.make_attacker(planned, torch.Generator(self.device))
        # One crafting step is timed. Each other crafting step costs one gradient pass.
        one = attacker.crafting.model_copy(update={"steps": 1})
        attacker = dataclasses.replace(attacker, crafting=one)
        precision = pick_precision(training.precision, self.device)

        def work(model: nn.Module, x: Tensor, y: Tensor) -> None:
            with computing(precision, self.device):
                loss = objective(model, x, y, attacker)
            loss.backward()

        key = ("step", cell.dataset, cell.arch, cell.objective, training)
        once = self._time(key, cell, work)
        passes = PASSES[cell.objective]
        steps = training.crafting.steps
        further = passes(steps)[1] - passes(1)[1]
        further += perturbation_passes(cell.objective) if training.awp else 0
        return once + further * self.gradient(cell, attacker.precision)

    def gradient(self, cell: Cell, precision: str = "fp32") -> float:
        """Return seconds for each image to compute its gradient on the folded view."""
        dtype = torch.bfloat16 if precision == "bf16" else None

        def work(model: nn.Module, x: Tensor, _: Tensor) -> None:
            view = folding.folded_view(model.eval(), x, dtype)
            torch.autograd.grad(view(x.requires_grad_(True)).sum(), x)

        return self._time(("gradient", cell.dataset, cell.arch, precision), cell, work)

    def forward(self, cell: Cell) -> float:
        """Return seconds for each image in a forward pass."""
        return self._time(
            ("forward", cell.dataset, cell.arch), cell, lambda model, x, y: model(x.detach())
        )

    def _time(
        self,
        key: tuple[Hashable, ...],
        cell: Cell,
        work: Callable[[nn.Module, Tensor, Tensor], object],
    ) -> float:
        if key not in self.timed:
            data = self.data(cell.dataset)
            assert data.classes is not None  # `datasets.describe` reads the labels if necessary
            model = construct.build(self.study, cell, data.image_shape, data.classes)
            model = model.to(self.device)
            size = min(self.study.planned[cell].training.batch_size, data.train_examples)
            x = torch.rand(size, *data.image_shape, device=self.device)
            y = torch.zeros(size, dtype=torch.int64, device=self.device)
            self.timed[key] = _seconds_per_image(lambda n: work(model, x[:n], y[:n]), size)
        return self.timed[key]


def describe(study: Study, layout: Layout, cores: int, config: str) -> str:
    """Return one line for each cell with its state and estimated time, then the total.

    The last line is the command that runs the study; config: the study file.
    """
    prepare(study.machine.threads)
    clock = Clock(study)
    lines = [
        f"{study.title}: {len(study.cells())} networks, "
        f"{len(study.cells()) * len(study.evaluation.selections)} evaluations",
        *study.left_out(),
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
    lines += ["", *_total(study, clock, total, longest, cores)]
    return "\n".join([*lines, f"start it: robsparse run {quote(config)} --cores {cores}"])


def _total(study: Study, clock: Clock, total: float, longest: float, cores: int) -> list[str]:
    on_gpu = clock.device.type == "cuda"
    hours, unit = total / 3600, "GPU-hours" if on_gpu else "hours of one job"
    assumed = f"assumes that {ROBUST_SHARE:.0%} of the images survive each attack"
    lines = [f"{hours:.3g} {unit} on {device_name(clock.device)}; {assumed}"]
    if on_gpu:
        return lines
    at_once = max(1, cores // study.machine.threads)
    wall = max(total / at_once, longest)
    return [
        *lines,
        f"about {_text(wall).strip()} with {cores} cores, {at_once} jobs at a time",
    ]


def training_seconds(clock: Clock, cell: Cell) -> float:
    """Return the estimated training time of a cell, without the cell that it starts from."""
    study = clock.study
    if study.is_external(cell.method):
        return SECONDS_TO_START_A_JOB
    method = registry.load("method", study.base("method", cell.method))
    fits = [stage.fit for stage in method.stages(study.planned[cell].params)]
    training = study.planned[cell].training
    size, examples = training.batch_size, clock.data(cell.dataset).train_examples
    extra = training.extra_images(cell.objective)
    labelled = size - (int(size * extra[1]) if extra else 0)
    steps = max(1, examples // labelled)
    once = sum(fit.epochs for fit in fits) * clock.step(cell)
    once += sum(fit.epochs * fit.clean_passes for fit in fits) * clock.forward(cell)
    perturbed = perturbation_passes(cell.objective) * sum(f.epochs for f in fits if uses_s2ap(f))
    once += perturbed * clock.gradient(cell)
    return SECONDS_TO_START_A_JOB + steps * min(size, examples) * once


def evaluation_seconds(clock: Clock, cell: Cell, selection: Selection) -> float:
    """Return the estimated time of all attacks on one set of weights."""
    settings = clock.study.evaluation
    seconds = SECONDS_TO_START_A_JOB
    for attack in clock.study.planned[cell].attacks[selection]:
        gradients, forwards = registry.load("attack", attack.base).passes(attack.params)
        each = gradients * clock.gradient(cell) + forwards * clock.forward(cell)
        seconds += settings.n_examples * ROBUST_SHARE * each
    corrupted = settings.n_examples * corruptions.passes(settings)
    seconds += corrupted * clock.forward(cell)
    looked = min(settings.sanity_checks.n_examples, settings.n_examples)
    gradients, forwards = sanity_checks.passes(settings)
    each = gradients * clock.gradient(cell) + forwards * clock.forward(cell)
    return seconds + looked * ROBUST_SHARE * each


def _seconds_per_image(work: Callable[[int], Any], most: int) -> float:
    """Return seconds for each image: the median over repeats of about a tenth of a second."""
    images, seconds = min(4, most), _seconds(work, min(4, most))
    while images < most and seconds < ENOUGH_SECONDS:
        images = min(2 * images, most)
        seconds = _seconds(work, images)
    repeats = 1 + int(seconds < 1) * 4
    return statistics.median(_seconds(work, images) for _ in range(repeats)) / images


def _seconds(work: Callable[[int], Any], images: int) -> float:
    began = time.perf_counter()
    work(images)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _text(seconds: float) -> str:
    if seconds == 0:
        return "    done"
    if seconds < 600:
        return f"{seconds:6.0f} s"
    if seconds < 36000:
        return f"{seconds / 60:4.0f} min"
    return f"{seconds / 3600:6.0f} h"
