"""Interrupting and resuming a training run: a job is safe to kill and safe to start twice."""

import hashlib
import io
import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch

from robsparse.base.errors import UsageError
from robsparse.base.files import atomic

_SUM = hashlib.sha256().digest_size


class Interrupted(Exception):
    """The run saved its state because of a signal; starting the same job again continues it."""

    def __init__(self, signum: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, to be resumed from {path}")
        self.signum = signum


class StopRequest:
    """Tells the loop when to stop between steps: after a signal, or after `max_steps` steps.

    The signals are SIGINT, SIGTERM and SIGUSR1. A stop after `max_steps` counts as SIGTERM.
    """

    def __init__(self, max_steps: int | None = None) -> None:
        self.signum: int | None = None
        self.steps_left = max_steps

    def after_step(self) -> int | None:
        """Count a finished step; the signal to stop by now, or None."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0 and self.signum is None:
                self.signum = signal.SIGTERM
        return self.signum

    @contextmanager
    def listen(self) -> Iterator["StopRequest"]:
        """Take the signals over inside the block."""

        def remember(signum: int, frame: types.FrameType | None) -> None:
            self.signum = signum

        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {signum: signal.signal(signum, remember) for signum in wanted}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises UsageError when another process is running the same job."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot write results here ({error.strerror})") from None
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{folder}: another process is running this very job") from None
    try:
        yield
    finally:
        lock.release()


class Checkpoint:
    """The resume state of one run, valid only for what decides that run.

    A state is one file: the SHA-256 of all that follows it, then what torch saves.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.path = folder / "state.pt"
        self.previous = folder / "state.previous.pt"
        self.digest = digest

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state atomically; the one before it is kept as state.previous.pt."""
        content = io.BytesIO()
        torch.save({"digest": self.digest, **state}, content)
        with atomic(self.path) as temporary:
            with temporary.open("wb") as handle:
                handle.write(hashlib.sha256(content.getbuffer()).digest())
                handle.write(content.getbuffer())
            if self.path.exists():
                os.replace(self.path, self.previous)

    def load(self) -> dict[str, Any] | None:
        """The newest whole state of the same run, or None to start afresh.

        One line says of each state that is there why it is not used.
        """
        for path, otherwise in (
            (self.path, "the state before it is tried"),
            (self.previous, "training starts afresh"),
        ):
            if path.exists():
                state = _read_intact(path)
                if state is None:
                    reason = "damaged"
                elif state.get("digest") != self.digest:
                    reason = "made with other settings, code, libraries or device"
                else:
                    return state
                print(f"{path}: {reason}; {otherwise}", flush=True)
        return None

    def clear(self) -> None:
        """Remove the states of a run that is finished, half-written ones included."""
        for pattern in ("state*.pt", ".state*.pt.*"):
            for path in self.path.parent.glob(pattern):
                path.unlink()


def _read_intact(path: Path) -> dict[str, Any] | None:
    """What a state file holds; None unless every byte is as it was written."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[_SUM:]).digest() != content[:_SUM]:
            return None
        state = torch.load(
            io.BytesIO(memoryview(content)[_SUM:]), map_location="cpu", weights_only=True
        )
    except Exception:  # unreadable, or whole and yet no state
        return None
    return state if isinstance(state, dict) else None
