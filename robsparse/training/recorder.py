"""The results of a training run: the curve, the cost, the best weights, and the files."""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from robsparse.base.files import file_checksum, write_parquet, write_record
from robsparse.compute.machine import device_name, peak_memory_mb, precision_note
from robsparse.kernels.library import instructions
from robsparse.networks import weights
from robsparse.records import provenance
from robsparse.sparsity.history import ConnectionLog, empty_lifetimes, empty_steps
from robsparse.sparsity.masks import plain_state
from robsparse.study.cost import PASSES, perturbation_passes
from robsparse.training.session import Session
from robsparse.training.stages import Stage, state_bytes
from robsparse.training.validation import guessing_accuracy, validate

# The held-out accuracy that a selection compares. The first of the best epochs is selected.
CRITERIA = {"best_val": "val_robust", "best_clean": "val_clean"}


@dataclass
class TrainingRecord:
    """The cost and the results of a run so far. A checkpoint stores all fields.

    seconds: training time. forward_passes, backward_passes: passes over a batch.
    peak_active: the largest number of active weights.
    state_bytes: the largest number of bytes of parameters, gradients, optimiser state and masks.
    collapsed: the number of validations in a row at the accuracy of guessing.
    failure: the reason why training stopped early, or "".
    crafted_on: what images were crafted on: "network", "view" or both.
    computed: how the training pass computed each layer with a known mask: "sparse", "dense", or
        both in one run.
    curve: one point for each epoch.
    best, best_states: for each selection in CRITERIA, the epoch and accuracy of the best
        validation, and the weights of this epoch.
    """

    seconds: float = 0.0
    forward_passes: float = 0
    backward_passes: float = 0
    peak_active: int = 0
    state_bytes: int = 0
    collapsed: int = 0
    failure: str = ""
    crafted_on: list[str] = field(default_factory=list)
    computed: dict[str, str] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    best_states: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def count_active(self, number: int) -> None:
        """Update the peak with a number of active weights."""
        self.peak_active = max(self.peak_active, number)


class Recorder:
    """Adds each step and epoch of a session to a record. `began`: the last start of the clock."""

    def __init__(self, session: Session, record: TrainingRecord) -> None:
        self.session, self.record, self.began = session, record, 0.0

    def start_clock(self) -> None:
        """Start to measure training time."""
        self.began = time.perf_counter()

    def stop_clock(self) -> None:
        """Add the time since `start_clock` to the record."""
        self.record.seconds += time.perf_counter() - self.began

    def end_step(self, stage: Stage) -> None:
        """Count the passes of a step, and record what its images were crafted on."""
        session, record = self.session, self.record
        forward, backward = PASSES[session.cell.objective](session.attacker.crafting.steps)
        perturbations = bool(session.run.gamma) + bool(stage.score_gamma(session.run))
        extra = perturbations * perturbation_passes(session.cell.objective)
        record.forward_passes += forward + extra + stage.fit.clean_passes
        record.backward_passes += backward + extra
        record.crafted_on = sorted({*record.crafted_on, *session.attacker.crafted_on})
        for name, way in session.run.computed.items():
            before = record.computed.setdefault(name, way)
            if way not in before:
                record.computed[name] = "dense and sparse"

    def end_epoch(self, stage: Stage, loss: float, accuracy: float) -> None:
        """Add a point to the curve, and store the weights if they are the best so far.

        If the training has collapsed, `record.failure` is set. `loss` and `accuracy` are the means
        of the epoch; the curve has the accuracy only if the stage follows overfitting.
        """
        session, record, run = self.session, self.record, self.session.run
        active = stage.active_weights(run)
        record.count_active(active)
        record.state_bytes = max(record.state_bytes, state_bytes(run, stage))
        steps, validation = session.batches.steps, session.settings.validation
        point = {
            "epoch": session.start.cost.get("epochs", 0) + len(record.curve) + 1,
            "stage": stage.name,
            "lr": stage.fit.lr * stage.lr_factor(run.epoch * steps, steps),
            "loss": loss,
            "active_weights": active,
        }
        if stage.follows_overfitting:
            point["train_accuracy"] = accuracy
        if run.epoch % validation.every == 0 or run.epoch + 1 == stage.fit.epochs:
            checked = session.held_out, session.attacker, validation.steps
            point |= validate(run.exported, *checked, stage.follows_overfitting)
            self._keep_best(stage, point)
            self._check_collapse(point)
        record.curve.append(point)
        self._print(stage, point)

    def _keep_best(self, stage: Stage, point: dict[str, Any]) -> None:
        record, state = self.record, None
        for selection, criterion in CRITERIA.items():
            best = record.best.get(selection, {}).get(criterion, -1.0)
            wanted = stage.selectable and selection in self.session.selections
            if wanted and point[criterion] > best:
                state = state or plain_state(self.session.run.exported)
                record.best[selection] = _selected(point, selection)
                record.best_states[selection] = state

    def _check_collapse(self, point: dict[str, Any]) -> None:
        """Set the failure if too many validations in a row are no better than guessing."""
        record, patience = self.record, self.session.settings.collapse_after
        guessing = guessing_accuracy(self.session.held_out)
        record.collapsed = record.collapsed + 1 if point["val_clean"] <= guessing else 0
        if patience and record.collapsed >= patience:
            record.failure = (
                f"training collapsed: held-out accuracy was no better than guessing the largest "
                f"class ({guessing:.3f}) in {patience} validations up to epoch {point['epoch']} "
                f"({point['stage']}); a warm-up (warmup, eps_warmup) or a smaller lr may help"
            )
            print(f"{self.session.cell.key}: {record.failure}", file=sys.stderr, flush=True)

    def _print(self, stage: Stage, point: dict[str, Any]) -> None:
        """Print about ten lines for each stage if there is no terminal for a progress bar."""
        done, epochs = self.session.run.epoch + 1, stage.fit.epochs
        if not sys.stderr.isatty() and (done % max(1, epochs // 10) == 0 or done == epochs):
            numbers = " ".join(
                f"{name} {point[name]:.3f}"
                for name in ("loss", "val_clean", "val_robust")
                if name in point
            )
            print(
                f"{stage.name} epoch {done}/{epochs}: {numbers} active {point['active_weights']}",
                flush=True,
            )


def write_results(session: Session, record: TrainingRecord) -> None:
    """Write the weights of each selection, the log of connections and the training record."""
    cell, layout, start = session.cell, session.layout, session.start
    last_state = plain_state(session.run.exported)
    # A collapsed run may have no epoch that can be selected.
    states = {s: record.best_states.get(s, last_state) for s in session.selections}
    for selection, state in states.items():
        weights.save(layout.model(cell, selection), state)
    tables = _write_connections(session, session.run.connections)
    selected = {s: record.best.get(s) or _selected(record.curve[-1], s) for s in states}
    write_record(
        layout.training(cell),
        {
            "cell": cell.key,
            "selected": selected,
            "failure": _failure(start.failure, record.failure),
            "crafted_on": " and ".join(record.crafted_on) or None,
            "computed": record.computed,
            "cost": _cost(session, record),
            "curve": start.curve + record.curve,
            "data_checksum": session.data_checksum,
            "start_checksum": file_checksum(start.weights) if start.weights else None,
            **provenance.current(),
            "kernels": instructions(session.device.type),
            **session.fingerprint.as_record(),
            "weights": {s: file_checksum(layout.model(cell, s)) for s in states},
            "tables": tables,
        },
    )


def _selected(point: dict[str, Any], selection: str) -> dict[str, Any]:
    """Return the entry of the record for the epoch of a selection."""
    return {key: point[key] for key in ("epoch", CRITERIA.get(selection, "val_robust"))}


def _write_connections(session: Session, log: ConnectionLog | None) -> dict[str, str]:
    """Write the history of connections; return the checksums of its tables by file name.

    The tables of a method that never rewires are empty.
    """
    tables = {
        session.layout.steps(session.cell): log.steps() if log else empty_steps(),
        session.layout.lifetimes(session.cell): log.lifetimes() if log else empty_lifetimes(),
    }
    for path, table in tables.items():
        write_parquet(path, table, compression="zstd")
    return {path.name: file_checksum(path) for path in tables}


def _failure(of_start: str, own: str) -> str:
    """Return why this network or its starting network failed, or "" if none failed."""
    return own or (of_start and f"started from a failed network: {of_start}")


def _cost(session: Session, record: TrainingRecord) -> dict[str, Any]:
    """Return the total cost of this run and of the training of its starting network."""
    before, device = session.start.cost, session.device
    own = {
        "epochs": len(record.curve),
        "seconds": round(record.seconds, 3),
        "forward_passes": round(record.forward_passes),
        "backward_passes": round(record.backward_passes),
    }
    precision = precision_note(session.attacker.precision, session.run.precision)
    return {key: value + before.get(key, 0) for key, value in own.items()} | {
        "peak_active_weights": max(record.peak_active, before.get("peak_active_weights", 0)),
        "training_state_bytes": max(record.state_bytes, before.get("training_state_bytes") or 0),
        "peak_memory_mb": max(peak_memory_mb(device), before.get("peak_memory_mb", 0.0)),
        "device": device_name(device) + precision,
    }
