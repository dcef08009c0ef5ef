"""Interrupting and resuming a training run. A job may be killed or started twice."""

import hashlib
import io
import os
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from robsparse.base.errors import UsageError
from robsparse.base.files import atomic

_SUM = hashlib.sha256().digest_size


class Interrupted(Exception):
    """A signal stopped the run after its state was saved. The same job, started again, resumes."""

    def __init__(self, signum: int, path: Path) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}; the same command resumes from {path}")
        self.signum = signum


class StopRequest:
    """Asks the loop to stop between two steps: after a signal, or after `max_steps` steps.

    The signals are SIGINT, SIGTERM and SIGUSR1. A stop after `max_steps` counts as SIGTERM.
    """

    def __init__(self, max_steps: int | None = None) -> None:
        self.signum: int | None = None
        self.steps_left = max_steps

    def after_step(self) -> int | None:
        """Count a finished step. Return the signal that requests a stop, or None."""
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left == 0 and self.signum is None:
                self.signum = signal.SIGTERM
        return self.signum

    @contextmanager
    def listen(self) -> Iterator["StopRequest"]:
        """Catch the signals inside the block, and restore the old handlers after it."""

        def remember(signum: int, frame: types.FrameType | None) -> None:
            self.signum = signum

        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {signum: signal.signal(signum, remember) for signum in wanted}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


class Checkpoint:
    """The resume state of one run.

    A state is one file. It starts with the SHA-256 of the rest; the rest is written by torch.save.
    `digest` identifies everything that decides the run. Only a state with this digest is loaded.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.path = folder / "state.pt"
        self.previous = folder / "state.previous.pt"
        self.digest = digest

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state atomically. The previous state becomes state.previous.pt."""
        content = io.BytesIO()
        torch.save({"digest": self.digest, **state}, content)
        with atomic(self.path) as temporary:
            with temporary.open("wb") as handle:
                handle.write(hashlib.sha256(content.getbuffer()).digest())
                handle.write(content.getbuffer())
            if self.path.exists():
                os.replace(self.path, self.previous)

    def load(self) -> dict[str, Any] | None:
        """Return the newest undamaged state of the same run, or None if there is none.

        One line is printed for each state that cannot be used, with the reason. A damaged state
        does not end the run: it only costs time.

        Raises:
            UsageError: if a folder has the name of a state.
        """
        for path, otherwise in (
            (self.path, "trying the previous state"),
            (self.previous, "training starts from the beginning"),
        ):
            if path.is_dir():
                raise UsageError(f"{path}: a folder, expected a file; remove it")
            if path.exists():
                state = _read_intact(path)
                if state is None:
                    reason = "damaged"
                elif state.get("digest") != self.digest:
                    reason = "saved with other settings, code, libraries or device"
                else:
                    return state
                print(f"{path}: {reason}; {otherwise}", flush=True)
        return None

    def clear(self) -> None:
        """Remove all states of a finished run, also incomplete files."""
        for pattern in ("state*.pt", ".state*.pt.*"):
            for path in self.path.parent.glob(pattern):
                path.unlink()


def _read_intact(path: Path) -> dict[str, Any] | None:
    """Return the content of a state file, or None if the file is damaged."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[_SUM:]).digest() != content[:_SUM]:
            return None
        state = torch.load(
            io.BytesIO(memoryview(content)[_SUM:]), map_location="cpu", weights_only=True
        )
    except Exception:  # unreadable, or another kind of file
        return None
    return state if isinstance(state, dict) else None
