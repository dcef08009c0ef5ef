"""The training loop. Every stage of every method runs in it.

`train` is the loop. The module `session` prepares its inputs, `recorder` records its results, and
`resuming` saves and restores its state.
"""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robsparse.base.errors import TrainingError, UsageError
from robsparse.base.files import locked, write_text
from robsparse.compute.machine import computing, pick_device, prepare
from robsparse.fast.sparse_pass import sparse_pass
from robsparse.networks import external
from robsparse.sparsity.masks import effective_weights
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study
from robsparse.training.checkpoints import Interrupted, StopRequest
from robsparse.training.objectives import Attacker, Objective
from robsparse.training.recorder import Recorder, write_results
from robsparse.training.resuming import Position, RunState
from robsparse.training.session import Session, prepare_session, stage_errors
from robsparse.training.stages import Run, Stage, end_stage
from robsparse.training.validation import last_logits
from robsparse.training.weight_perturbation import perturbed_scores, perturbed_weights


def train_cell(
    study: Study,
    cell: Cell,
    layout: Layout,
    *,
    device: str | None = None,
    threads: int | None = None,
    max_steps: int | None = None,
) -> None:
    """Train one cell and write the weights of each selection, curves and cost.

    An interrupted run with the same settings is continued.

    Args:
        study, cell, layout: the study, the cell to train, and the paths of its files.
        device, threads: replace those of the study.
        max_steps: stop after this number of steps, as after a signal. Tests of resuming use it.

    Raises:
        UsageError: if the starting weights are missing.
        TrainingError: if the loss, a weight or a score is not finite.
        Interrupted: after a signal.
    """
    prepare(threads or study.machine.threads)
    failed = layout.failed(cell)
    with locked(layout.resume(cell)):
        if study.is_external(cell.method):
            with _failure_written(failed, UsageError):
                external.import_network(study, cell, layout)
            return
        with _failure_written(failed, TrainingError), StopRequest(max_steps).listen() as stop:
            training_device = pick_device(device or study.machine.device)
            session = prepare_session(study, cell, layout, training_device)
            state = RunState(session)
            train(session, state, stop)
            write_results(session, state.record)
            state.checkpoint.clear()
            print(f"trained {cell.key}: {layout.training(cell).parent}")


@contextmanager
def _failure_written(path: Path, failure: type[Exception]) -> Iterator[None]:
    """Write the message of a failure to a file for `collect`. A new attempt removes the file."""
    path.unlink(missing_ok=True)
    try:
        yield
    except failure as error:
        write_text(path, f"{error}\n")
        raise


def train(session: Session, state: RunState, stop: StopRequest) -> None:
    """Run all stages of the method. An interrupted run continues at its saved position.

    A collapsed training ends early, with `failure` in its record.

    Raises:
        TrainingError: if a loss or the network is not finite.
        Interrupted: if `stop` requested a stop. The state is saved before.
    """
    run, batches = session.run, session.batches
    position, record = state.position, state.record
    recorder = Recorder(session, record)
    for stage in session.stages[position.stage :]:
        with stage_errors(session, stage):
            state.begin_stage(stage)
            for epoch in _epochs_left(session, stage, position):
                recorder.start_clock()
                run.epoch = epoch
                images = batches.epoch(len(record.curve))
                if position.step == 0:
                    _set_step(run, stage, epoch * batches.steps)
                    stage.before_epoch(run)
                for step in range(position.step, batches.steps):
                    _set_step(run, stage, epoch * batches.steps + step)
                    batch = images.batch(step)
                    attacker = attacker_at(session, position)
                    loss = compute_gradients(run, stage, session.objective, attacker, batch)
                    update(run, stage)
                    position.end_step(loss, run.train_accuracy)
                    recorder.end_step(stage)
                    if (signum := stop.after_step()) is not None:
                        recorder.stop_clock()
                        state.save(stage)
                        raise Interrupted(signum, state.checkpoint.path)
                sums = position.read_loss(), position.accuracy_sum
                _check_finite(run.model)
                recorder.end_epoch(stage, *(float(total) / batches.steps for total in sums))
                recorder.stop_clock()
                position.end_epoch()
                if record.failure:
                    break
                state.save_if_due(stage)
            end_stage(run, stage)
        if record.failure:
            break
        position.end_stage()


def compute_gradients(
    run: Run,
    stage: Stage,
    objective: Objective,
    attacker: Attacker,
    batch: tuple[Tensor, Tensor],
) -> Tensor:
    """Craft adversarial images, and compute the loss with the penalty of the stage, and gradients.

    Args:
        run, stage: the network and its stage.
        objective: the loss of a batch.
        attacker: crafts the adversarial images.
        batch: x_NCHW in [0,1], y_N.

    Returns:
        The detached loss. A GPU may still be computing it.
    """
    x_NCHW, y_N = batch
    run.model.train()
    with effective_weights(run.model), ExitStack() as step:
        with computing(run.precision, x_NCHW.device), _sparse_pass(run, stage, x_NCHW):
            _pass_clean(run.model, x_NCHW, stage.fit.clean_passes > 0)
            for perturbed, gamma in (
                (perturbed_scores, stage.score_gamma(run)),
                (perturbed_weights, run.gamma),
            ):
                attacker = step.enter_context(
                    perturbed(run.model, objective, attacker, batch, gamma)
                )
            with last_logits(run.model, stage.follows_overfitting) as logits:
                loss = objective(run.model, x_NCHW, y_N, attacker)
            _pass_clean(run.model, x_NCHW, stage.fit.clean_passes > 1)
        penalty = stage.penalty(run)
        if penalty is not None:
            loss = loss + penalty
        run.optimizer.zero_grad()
        loss.backward()
    if logits:
        run.train_accuracy = (logits[0].argmax(1) == y_N).double().mean()
    return loss.detach()


def _sparse_pass(run: Run, stage: Stage, x_NCHW: Tensor) -> AbstractContextManager[None]:
    """Return a block that computes passes by the active weights, if this step may do so."""
    if not run.sparse_compute or stage.reads_all_gradients(run):
        return nullcontext()
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    return sparse_pass(run.model, x_NCHW, dtype, run.computed)


def _pass_clean(model: nn.Module, x_NCHW: Tensor, wanted: bool) -> None:
    """Make one more pass over the clean batch, which updates batch norm, if `wanted`."""
    if wanted:
        with torch.no_grad():
            model(x_NCHW)


def update(run: Run, stage: Stage) -> None:
    """Make a step of the optimiser. The hooks of the stage run before and after it."""
    stage.before_step(run)
    if stage.fit.decay == "sgdw":
        # Weight decay of all trained tensors. It is not multiplied by the learning rate.
        factor = 1 - stage.fit.weight_decay * run.lr_factor
        with torch.no_grad():
            for group in run.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor)
    run.optimizer.step()
    stage.after_step(run)
    if run.average is not None:
        run.average.update(run.model)


def attacker_at(session: Session, position: Position) -> Attacker:
    """Return the attacker of the next step. It is weaker during the warm-up of a new network."""
    steps = session.batches.steps * session.settings.crafting.eps_warmup
    done = session.batches.steps * position.epoch + position.step
    if session.start.weights or position.stage > 0 or done >= steps:
        return session.attacker
    return session.attacker.scaled((done + 1) / steps)


def _epochs_left(session: Session, stage: Stage, position: Position) -> Iterator[int]:
    """Return the epochs of the stage that remain, with a progress bar on a terminal."""
    description = f"{session.cell.key} {stage.name}"
    return iter(
        tqdm(range(position.epoch, stage.fit.epochs), description, unit="epoch", disable=None)
    )


def _set_step(run: Run, stage: Stage, step: int) -> None:
    """Set the step (counted from 0 in the stage) and its learning rate for the hooks."""
    run.step = step
    set_learning_rate(run, stage, stage.lr_factor(step, run.steps // stage.fit.epochs))


def set_learning_rate(run: Run, stage: Stage, factor: float) -> None:
    """Set the learning rate of the next step to `factor` times the initial learning rate."""
    before = run.lr
    run.lr_factor, run.lr = factor, stage.fit.lr * factor
    run.optimizer.param_groups[0]["lr"] = run.lr
    if stage.fit.velocity == "tensorflow" and run.lr and before not in (0.0, run.lr):
        for state in run.optimizer.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_(before / run.lr)


def _check_finite(model: nn.Module) -> None:
    """Raise TrainingError if a tensor is not finite. No later loss would show it."""
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if not value.isfinite().all():
            raise TrainingError(f"'{name}' holds NaN or infinite values")
