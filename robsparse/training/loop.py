"""The one training loop: every stage of every method runs here."""

import copy
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import TrainingError, UsageError
from robsparse.base.files import atomic, file_checksum, read_json, write_json
from robsparse.compute import randomness
from robsparse.compute.machine import (
    computing,
    device_name,
    laid_out,
    peak_memory_mb,
    pick_device,
    pick_precision,
    precision_note,
    prepare,
)
from robsparse.datasets import Part, Splits
from robsparse.datasets._arrays import pseudo_labelled
from robsparse.fast.structure import runs
from robsparse.networks import construct, external, weights
from robsparse.records import provenance
from robsparse.schema.training import Fit
from robsparse.sparsity.history import ConnectionLog, no_lifetimes, no_steps
from robsparse.sparsity.masks import effective_weights, plain_state
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout, derive_seed
from robsparse.study.cost import PASSES
from robsparse.study.study import Study
from robsparse.training import batches, objectives
from robsparse.training.checkpoints import Checkpoint, Interrupted, Progress, StopRequest, locked
from robsparse.training.stages import Run, Stage
from robsparse.training.validation import largest_class, validate

SECONDS_BETWEEN_CHECKPOINTS = 60.0
PLACE = ("epoch", "step", "steps", "lr", "lr_factor")  # where a run is, as its hooks see it


def train_cell(
    study: Study,
    cell: Cell,
    layout: Layout,
    *,
    device: str | None = None,
    threads: int | None = None,
    max_steps: int | None = None,
) -> None:
    """Train one cell and write its weights (best_val and last), curves and cost.

    Continues an interrupted run of the same settings. `max_steps` stops as a signal would after
    that many steps of this call, for tests of resuming.

    Raises UsageError when the starting weights are missing, TrainingError when the loss, a weight
    or a score is not finite, Interrupted after a signal.
    """
    prepare(threads or study.machine.threads)
    with locked(layout.resume(cell)):
        if study.is_external(cell.method):
            with _noted(layout.failed(cell), UsageError):
                external.take_in(study, cell, layout)
            return
        with _noted(layout.failed(cell), TrainingError), StopRequest().listen() as stop:
            trainer = Trainer(study, cell, layout, pick_device(device or study.machine.device))
            trainer.run_stages(stop, max_steps)
            trainer.write()


@contextmanager
def _noted(path: Path, failure: type[Exception]) -> Iterator[None]:
    """Leave a note of a failure, for `collect` to say; a new attempt takes the old one away."""
    path.unlink(missing_ok=True)
    try:
        yield
    except failure as error:
        with atomic(path) as temporary:
            temporary.write_text(f"{error}\n")
        raise


@contextmanager
def _of_method(cell: Cell, path: Path) -> Iterator[None]:
    """Turn what a method's own code raises into one line that names its file and line."""
    try:
        yield
    except (TrainingError, UsageError, Interrupted, OSError):
        raise
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == str(path)]
        if not lines:
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise TrainingError(f"{cell.key}: {path}, line {lines[-1]}: {said}") from error


def optimizer_of(stage: Stage, model: nn.Module) -> torch.optim.SGD:
    """What a stage is optimised with."""
    fit = stage.fit
    return torch.optim.SGD(
        stage.parameters(model),
        lr=fit.lr,
        momentum=fit.momentum,
        weight_decay=fit.weight_decay if fit.decay == "coupled" else 0.0,
    )


def descend(run: Run, stage: Stage, loss: Callable[[], Tensor], x_NCHW: Tensor) -> Tensor:
    """All passes of one step: gradients are in place then. Returns the loss with its penalty."""
    run.model.train()
    with effective_weights(run.model):
        with computing(run.precision, x_NCHW.device):
            clean_passes = stage.fit.clean_passes
            _pass_clean(run.model, x_NCHW, clean_passes > 0)
            total = loss()
            _pass_clean(run.model, x_NCHW, clean_passes > 1)
        penalty = stage.penalty(run)
        if penalty is not None:
            total = total + penalty
        run.optimizer.zero_grad()
        total.backward()
    return total.detach()


def _pass_clean(model: nn.Module, x_NCHW: Tensor, wanted: bool) -> None:
    """Let batch norm see the clean batch once more."""
    if wanted:
        with torch.no_grad():
            model(x_NCHW)


def update(run: Run, stage: Stage) -> None:
    """Change the parameters by the gradients in place, and let the method do what it does then."""
    stage.before_step(run)
    if stage.fit.decay == "sgdw":
        # Weight decay that is not multiplied by the learning rate, on all trained tensors.
        factor = 1 - stage.fit.weight_decay * run.lr_factor
        with torch.no_grad():
            for group in run.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor)
    run.optimizer.step()
    stage.after_step(run)


class Trainer:
    """One cell's training run."""

    def __init__(self, study: Study, cell: Cell, layout: Layout, device: torch.device) -> None:
        self.study, self.cell, self.layout, self.device = study, cell, layout, device
        self.fingerprint = fingerprints.training(study, cell)
        self.training = study.training_of(cell)
        splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
        self.data_checksum = splits.checksum()
        self.validation = splits.validation.to(device)
        extra = self._extra_images(splits)
        self.batches = batches.Batches(study, cell, splits.train, extra, device)
        self.objective = objectives.of(cell.objective, self.training)
        generator = self._generator("craft", cell.dataset, cell.objective)
        self.attacker = objectives.attacker_of(study, cell, generator)
        self.start = self._read_start()
        self.progress = Progress()
        self.takes_layout: bool | None = None
        method = study.base("method", cell.method)
        self.run = Run(
            model=self._initial_model(splits),
            sparsity=cell.sparsity,
            # Variants of a method make the same random choices as long as they go the same way.
            generator=self._generator("method", method, f"{cell.sparsity:.4f}"),
            arch=study.base("arch", cell.arch),
            precision=pick_precision(self.training.precision, device),
            log_every=self.training.log_every,
        )
        self.method = study.entry("method", cell.method)
        self.stages = self._stages(method)
        precisions = (self.attacker.precision, self.run.precision)
        decided = self.fingerprint.whole(device.type, *precisions)
        self.checkpoint = Checkpoint(layout.resume(cell), decided)
        self.saved_at = time.monotonic()

    def _generator(self, *axes: str) -> torch.Generator:
        generator = torch.Generator(self.device)
        return generator.manual_seed(derive_seed(*axes, self.cell.seed))

    def _stages(self, method: str) -> list[Stage]:
        try:
            module = registry.load("method", method)
        except UsageError as error:  # its file cannot be used: no fault of this command's input
            raise TrainingError(f"{self.cell.key}: {error}") from error
        with _of_method(self.cell, self.method.path):
            return module.stages(self.study.planned[self.cell].params)

    def _extra_images(self, splits: Splits) -> Part | None:
        """Pseudo-labelled images for robust self-training."""
        if self.cell.objective != "rst":
            return None
        path = Path(self.training.rst_file or "")
        return pseudo_labelled(path, splits.image_shape, splits.classes)

    def _read_start(self) -> dict[str, Any] | None:
        """Record of the cell whose last weights this one starts from (HYDRA's hand-over)."""
        start = self.study.starting_cell(self.cell)
        if start is None:
            return None
        path = self.layout.model(start, "last")
        if not path.exists():
            raise UsageError(
                f"{path}: the weights that '{self.cell.method}' starts from are missing; "
                f"train --cell {start.key} first"
            )
        return read_json(self.layout.training(start)) | {"path": path}

    def _initial_model(self, splits: Splits) -> nn.Module:
        """The same initial weights for every method: seeded by arch and seed alone."""
        cell = self.cell
        randomness.seed(derive_seed("init", cell.arch, cell.seed))
        model = construct.build(self.study, cell, splits.image_shape, splits.classes)
        if self.start:
            weights.load_into(model, self.start["path"])
        return model.to(self.device)

    # ---------------------------------------------------------------- the loop

    def run_stages(self, stop: StopRequest, max_steps: int | None) -> None:
        """Run all stages, from the checkpoint if there is one."""
        saved = self.checkpoint.load()
        if saved:
            self.progress = Progress(**saved["progress"])
            print(
                f"resuming {self.cell.key} at stage {self.progress.stage + 1}, "
                f"epoch {self.progress.epoch + 1}"
            )
        budget = [max_steps if max_steps is not None else -1]
        while self.progress.stage < len(self.stages):
            stage = self.stages[self.progress.stage]
            with _of_method(self.cell, self.method.path), self._where(stage):
                self._fit(stage, saved, stop, budget)
            saved = None
            if self.progress.failure:
                break
            self.progress.stage += 1
            self.progress.epoch = 0

    @contextmanager
    def _where(self, stage: Stage) -> Iterator[None]:
        """Say of what cannot be trained on from in which cell, stage and epoch it came up."""
        try:
            yield
        except TrainingError as error:
            raise TrainingError(
                f"{self.cell.key}: {error} in stage {stage.name}, epoch {self.run.epoch + 1}; "
                "a smaller lr may help"
            ) from error

    def _fit(self, stage: Stage, saved: dict | None, stop: StopRequest, budget: list[int]) -> None:
        run, progress, fit = self.run, self.progress, stage.fit
        if saved:
            self._put_back(saved["before_stage"])
        self.before_stage = copy.deepcopy(self._state())
        run.epoch, run.step, run.steps = 0, 0, fit.epochs * self.batches.steps
        run.lr, run.lr_factor, run.optimizer = fit.lr, 1.0, None
        stage.before_fit(run)
        run.optimizer = optimizer_of(stage, run.model)
        if saved:
            self._restore(stage, saved)
        else:
            progress.peak_live = max(progress.peak_live, stage.active_weights(run))
        epochs = range(progress.epoch, fit.epochs)
        for epoch in tqdm(epochs, desc=f"{self.cell.key} {stage.name}", unit="epoch", disable=None):
            progress.epoch = run.epoch = epoch
            self._epoch(stage, stop, budget)
            progress.step, progress.loss_sum = 0, 0.0
            progress.epoch = epoch + 1
            if progress.failure:
                break
            if time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                self._save(stage)
        stage.finalize(run)

    def _epoch(self, stage: Stage, stop: StopRequest, budget: list[int]) -> None:
        run, progress = self.run, self.progress
        began = time.perf_counter()
        steps = self.batches.steps
        sources = self.batches.epoch(len(progress.curve))
        if progress.step == 0:
            self._turn_to(stage, run.epoch * steps)
            stage.before_epoch(run)
        for step in range(progress.step, steps):
            self._turn_to(stage, run.epoch * steps + step)
            progress.loss_sum += self._step(stage, *batches.mixed(sources, step))
            progress.step += 1
            budget[0] -= 1
            stopped = stop.signum is not None or budget[0] == 0
            if stopped or step + 1 == steps or self.device.type == "cpu":
                self._look_at_loss()  # for which a GPU has to be waited for
            if stopped:
                progress.seconds += time.perf_counter() - began
                self._save(stage)
                raise Interrupted(stop.signum or 15, self.checkpoint.path)
        self._end_epoch(stage, steps)
        progress.seconds += time.perf_counter() - began

    def _turn_to(self, stage: Stage, step: int) -> None:
        """Let the hooks see a step of the stage, and its learning rate."""
        self.run.step = step
        self._set_lr(stage.fit, stage.lr_factor(step, self.batches.steps))

    def _set_lr(self, fit: Fit, factor: float) -> None:
        """Set the learning rate of the coming step, as `factor` times the initial one."""
        run, before = self.run, self.run.lr
        run.lr_factor, run.lr = factor, fit.lr * factor
        run.optimizer.param_groups[0]["lr"] = run.lr
        if fit.velocity == "tensorflow" and run.lr and before not in (0.0, run.lr):
            for state in run.optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].mul_(before / run.lr)

    def _attacker(self) -> objectives.Attacker:
        """The attacker of this step: weaker while a network from scratch warms up."""
        steps = self.batches.steps * self.training.crafting.eps_warmup
        done = self.batches.steps * self.run.epoch + self.progress.step
        if self.start or self.progress.stage > 0 or done >= steps:
            return self.attacker
        return self.attacker.scaled((done + 1) / steps)

    def _step(self, stage: Stage, x_NCHW: Tensor, y_N: Tensor) -> Tensor:
        """One update; returns the loss, which the device may still be computing."""
        run, attacker = self.run, self._attacker()
        x_NCHW = self._laid_out(x_NCHW)
        loss = descend(run, stage, lambda: self.objective(run.model, x_NCHW, y_N, attacker), x_NCHW)
        self.progress.crafted_on = sorted({*self.progress.crafted_on, *attacker.crafted_on})
        self._count_passes(stage.fit)
        update(run, stage)
        return loss.double()

    def _laid_out(self, x_NCHW: Tensor) -> Tensor:
        """Images as the precision wants them, unless the network's code takes no such layout."""
        laid = laid_out(x_NCHW, self.run.precision)
        if self.takes_layout is None:
            self.takes_layout = laid is x_NCHW or runs(self.run.model, laid)
        return laid if self.takes_layout else x_NCHW

    def _look_at_loss(self) -> None:
        """Read what the losses of the epoch add up to so far. Raises TrainingError if it is NaN."""
        self.progress.loss_sum = float(self.progress.loss_sum)
        if not math.isfinite(self.progress.loss_sum):
            raise TrainingError(f"the loss is {self.progress.loss_sum}")

    def _look_at_network(self) -> None:
        """Raise TrainingError if a tensor is not finite: the last step shows in no later loss."""
        model = self.run.model
        for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
            if not value.isfinite().all():
                raise TrainingError(f"'{name}' holds NaN or infinite values")

    def _count_passes(self, fit: Fit) -> None:
        forward, backward = PASSES[self.cell.objective](self.attacker.crafting.steps)
        self.progress.forward_passes += forward + fit.clean_passes
        self.progress.backward_passes += backward

    def _end_epoch(self, stage: Stage, steps: int) -> None:
        """Add a point to the curve; keep the exported weights if they are the best so far."""
        run, progress = self.run, self.progress
        self._look_at_network()
        live = stage.active_weights(run)
        progress.peak_live = max(progress.peak_live, live)
        point = {
            "epoch": self._epochs_before() + len(progress.curve) + 1,
            "stage": stage.name,
            "lr": stage.fit.lr * stage.lr_factor(run.epoch * steps, steps),
            "loss": progress.loss_sum / steps,
            "active_weights": live,
        }
        validation = self.training.validation
        if run.epoch % validation.every == 0 or run.epoch + 1 == stage.fit.epochs:
            point |= validate(run.model, self.validation, self.attacker, validation.steps)
            better = point["val_robust"] > progress.best.get("val_robust", -1.0)
            if stage.selectable and better:
                progress.best = {"epoch": point["epoch"], "val_robust": point["val_robust"]}
                progress.best_state = plain_state(run.model)
            self._watch_for_collapse(point)
        progress.curve.append(point)
        self._report(stage, point)

    def _watch_for_collapse(self, point: dict[str, Any]) -> None:
        """Note a failure when the network has only guessed for too many validations in a row."""
        progress, patience = self.progress, self.training.collapse_after
        guessing = largest_class(self.validation)
        progress.collapsed = progress.collapsed + 1 if point["val_clean"] <= guessing else 0
        if patience and progress.collapsed >= patience:
            progress.failure = (
                f"training collapsed: held-out accuracy was no better than guessing the largest "
                f"class ({guessing:.3f}) in {patience} validations up to epoch {point['epoch']} "
                f"({point['stage']}); a warm-up (warmup, eps_warmup) or a smaller lr may help"
            )
            print(f"{self.cell.key}: {progress.failure}", file=sys.stderr, flush=True)

    def _report(self, stage: Stage, point: dict[str, Any]) -> None:
        """About ten plain lines a stage where there is no terminal for a progress bar."""
        done, epochs = self.run.epoch + 1, stage.fit.epochs
        if not sys.stderr.isatty() and (done % max(1, epochs // 10) == 0 or done == epochs):
            numbers = " ".join(
                f"{name} {point[name]:.3f}"
                for name in ("loss", "val_clean", "val_robust")
                if name in point
            )
            print(
                f"{stage.name} epoch {done}/{epochs}: {numbers} live {point['active_weights']}",
                flush=True,
            )

    # ---------------------------------------------------------------- resuming

    def _save(self, stage: Stage) -> None:
        run = self.run
        self.checkpoint.save(
            {
                "progress": vars(self.progress),
                "before_stage": self.before_stage,
                "now": self._state(),
                "optimizer": run.optimizer.state_dict(),
                "at": {name: getattr(run, name) for name in PLACE},
                "stage": stage.state(),
            }
        )
        self.saved_at = time.monotonic()

    def _restore(self, stage: Stage, saved: dict[str, Any]) -> None:
        self._put_back(saved["now"])
        self.run.optimizer.load_state_dict(saved["optimizer"])
        for name in PLACE:
            setattr(self.run, name, saved["at"][name])
        stage.load_state(saved["stage"])

    def _state(self) -> dict[str, Any]:
        """The network, what became of its connections, and all random numbers to come."""
        run = self.run
        return {
            "model": run.model.state_dict(),
            "connections": run.connections.state() if run.connections else None,
            "generators": [generator.get_state() for generator in self._generators()],
            "global": randomness.state(self.device),
        }

    def _put_back(self, state: dict[str, Any]) -> None:
        """Bring back what `_state` returned."""
        run, log = self.run, state["connections"]
        run.model.load_state_dict(state["model"])
        run.connections = ConnectionLog.from_state(log, self.device) if log else None
        for generator, its_state in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(its_state)
        randomness.restore(state["global"], self.device)

    def _generators(self) -> list[torch.Generator]:
        return [self.attacker.generator, self.run.generator]

    # ---------------------------------------------------------------- results

    def _epochs_before(self) -> int:
        return self.start["cost"]["epochs"] if self.start else 0

    def write(self) -> None:
        """Write weights, step log and the training record; then forget the checkpoint."""
        progress, cell, layout = self.progress, self.cell, self.layout
        last_state = plain_state(self.run.model)
        # A collapsed run may never have come to a stage whose epochs can be selected.
        states = {"best_val": progress.best_state or last_state, "last": last_state}
        for selection, state in states.items():
            weights.save(layout.model(cell, selection), state)
        self._write_log()
        last_point = {key: progress.curve[-1][key] for key in ("epoch", "val_robust")}
        write_json(
            layout.training(cell),
            {
                "cell": cell.key,
                "selected": {
                    "best_val": progress.best or last_point,
                    "last": last_point,
                },
                "failure": self._failure(),
                "crafted_on": " and ".join(progress.crafted_on) or None,
                "cost": self._cost(),
                "curve": (self.start["curve"] if self.start else []) + progress.curve,
                "data_checksum": self.data_checksum,
                "start_checksum": file_checksum(self.start["path"]) if self.start else None,
                **provenance.current(),
                **self.fingerprint.kept(),
                "weights": {s: file_checksum(layout.model(cell, s)) for s in states},
            },
        )
        self.checkpoint.clear()
        print(f"trained {cell.key}: {layout.model(cell, 'best_val').parent}")

    def _write_log(self) -> None:
        """Write what became of the connections; empty tables for a method that never rewires."""
        log = self.run.connections
        tables = {
            self.layout.steps(self.cell): log.steps() if log else no_steps(),
            self.layout.lifetimes(self.cell): log.lifetimes() if log else no_lifetimes(),
        }
        for path, table in tables.items():
            with atomic(path) as temporary:
                table.to_parquet(temporary, compression="zstd")

    def _failure(self) -> str:
        """Why this network, or the one that it started from, failed; empty if neither did."""
        before = self.start["failure"] if self.start else ""
        return self.progress.failure or (before and f"started from a failed network: {before}")

    def _cost(self) -> dict[str, Any]:
        """Cost of this run and of the one that it started from, added up."""
        progress, before = self.progress, self.start["cost"] if self.start else {}
        own = {
            "epochs": len(progress.curve),
            "seconds": round(progress.seconds, 3),
            "forward_passes": round(progress.forward_passes),
            "backward_passes": round(progress.backward_passes),
        }
        return {key: value + before.get(key, 0) for key, value in own.items()} | {
            "peak_active_weights": max(progress.peak_live, before.get("peak_active_weights", 0)),
            "peak_memory_mb": max(peak_memory_mb(self.device), before.get("peak_memory_mb", 0.0)),
            "device": device_name(self.device)
            + precision_note(self.attacker.precision, self.run.precision),
        }
