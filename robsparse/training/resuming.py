"""Saving a training run between two steps, and continuing it from the saved state."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robsparse.base.errors import TrainingError
from robsparse.compute import randomness
from robsparse.sparsity.history import ConnectionLog
from robsparse.training.checkpoints import Checkpoint
from robsparse.training.recorder import TrainingRecord
from robsparse.training.session import Session
from robsparse.training.stages import Stage, begin_stage

SECONDS_BETWEEN_CHECKPOINTS = 60.0
# The fields of Run that change from step to step.
PLACE = ("epoch", "step", "steps", "lr", "lr_factor")


@dataclass
class Position:
    """The position of a run: stage and epoch (from 0), and the finished steps of the epoch.

    `loss_sum` is the sum of the losses of these steps, and `accuracy_sum` that of the accuracies in
    their passes. A GPU may still be computing them.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    loss_sum: float | Tensor = 0.0
    accuracy_sum: float | Tensor = 0.0

    def end_step(self, loss: Tensor, accuracy: float | Tensor) -> None:
        """Count a step, its loss and its accuracy.

        Raises:
            TrainingError: if a loss on a CPU is not finite.
        """
        self.step += 1
        self.loss_sum += loss.double()
        self.accuracy_sum += accuracy
        if loss.device.type == "cpu":
            self.read_loss()

    def read_loss(self) -> float:
        """Return the sum of the losses. With a GPU, this waits for the GPU.

        Raises:
            TrainingError: if the sum is not finite.
        """
        self.loss_sum, self.accuracy_sum = float(self.loss_sum), float(self.accuracy_sum)
        if not math.isfinite(self.loss_sum):
            raise TrainingError(f"the loss is {self.loss_sum}")
        return self.loss_sum

    def end_epoch(self) -> None:
        """Go to the first step of the next epoch."""
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum = self.accuracy_sum = 0.0

    def end_stage(self) -> None:
        """Go to the first epoch of the next stage."""
        self.stage, self.epoch = self.stage + 1, 0


class RunState:
    """The state of a run between two steps, and its checkpoint.

    position: the position of the run.
    record: its cost and its results so far.
    before_stage: the network and the random numbers before the stage. A resumed run prepares the
        stage from them again.
    saved: the loaded checkpoint. It is None after its stage has been restored.
    """

    def __init__(self, session: Session) -> None:
        """Load the checkpoint of an interrupted run with the same settings, if there is one."""
        self.session = session
        precisions = (session.attacker.precision, session.run.precision)
        # The record has no weights of a selection that was not asked for when it was saved.
        digest = session.fingerprint.whole(session.device.type, *precisions, session.selections)
        self.checkpoint = Checkpoint(session.layout.resume(session.cell), digest)
        self.saved = self.checkpoint.load()
        self.position, self.record = Position(), TrainingRecord()
        self.before_stage: dict[str, Any] = {}
        self.saved_at = time.monotonic()
        if self.saved:
            self.position = Position(**self.saved["position"])
            self.record = TrainingRecord(**self.saved["record"])
            print(
                f"resuming {session.cell.key} at stage {self.position.stage + 1}, "
                f"epoch {self.position.epoch + 1}"
            )

    def begin_stage(self, stage: Stage) -> None:
        """Prepare a stage. If the run was interrupted in this stage, restore the saved state."""
        session, saved, self.saved = self.session, self.saved, None
        if saved:
            self._restore(saved["before_stage"])
        self.before_stage = copy.deepcopy(self._state())
        session.run.curve = []
        begin_stage(session.run, stage, stage.fit.epochs * session.batches.steps)
        session.run.curve = self.record.curve
        if saved:
            self._restore(saved["now"])
            session.run.optimizer.load_state_dict(saved["optimizer"])
            for name in PLACE:
                setattr(session.run, name, saved["place"][name])
            stage.load_state(saved["stage"])
        else:
            self.record.count_active(stage.active_weights(session.run))

    def save(self, stage: Stage) -> None:
        """Replace the checkpoint.

        Raises:
            TrainingError: if the losses so far are not finite.
        """
        run = self.session.run
        self.position.read_loss()
        self.checkpoint.save(
            {
                "position": vars(self.position),
                "record": vars(self.record),
                "before_stage": self.before_stage,
                "now": self._state(),
                "optimizer": run.optimizer.state_dict(),
                "place": {name: getattr(run, name) for name in PLACE},
                "stage": stage.state(),
            }
        )
        self.saved_at = time.monotonic()

    def save_if_due(self, stage: Stage) -> None:
        """Save if the last checkpoint is older than SECONDS_BETWEEN_CHECKPOINTS."""
        if time.monotonic() - self.saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            self.save(stage)

    def _state(self) -> dict[str, Any]:
        """Return the network, its average, the history of its connections, and random states."""
        run, generators = self.session.run, self._generators()
        return {
            "model": run.model.state_dict(),
            "average": run.average.state() if run.average else None,
            "connections": run.connections.state() if run.connections else None,
            "generators": [generator.get_state() for generator in generators],
            "global": randomness.state(self.session.device),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore a result of `_state`."""
        run, device, log = self.session.run, self.session.device, state["connections"]
        run.model.load_state_dict(state["model"])
        if run.average is not None:
            run.average.load_state(state["average"])
        run.connections = ConnectionLog.from_state(log, device) if log else None
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved)
        randomness.restore(state["global"], device)

    def _generators(self) -> list[torch.Generator]:
        return [self.session.attacker.generator, self.session.run.generator]
