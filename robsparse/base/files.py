"""Atomic writing, locks, JSON, safetensors and checksums. This module does not import torch."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import filelock
from safetensors import safe_open

from robsparse.base.errors import UsageError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds.

    A reader sees the old file or the complete new file.

    Raises:
        UsageError: if the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise UsageError if no file can be written to a folder. Call this before a long run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder}: cannot write results here ({error.strerror})")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder inside the block.

    Raises:
        UsageError: if another process is running the same job, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{folder}: another process is running the same job") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        UsageError: if the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{path}: damaged, not valid JSON ({error})") from None


def read_tensors(path: Path, framework: Literal["np", "pt"] = "np") -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Args:
        path: the file.
        framework: "np" for NumPy arrays, "pt" for torch tensors.

    Raises:
        UsageError: if an older version of robsparse wrote the file; it packed sparse tensors.
        OSError, SafetensorError: if the file is missing or damaged.
    """
    with safe_open(path, framework=framework) as stored:
        if "robsparse.packed" in (stored.metadata() or {}):
            raise UsageError(
                f"{path}: packed weights of an older version, expected plain safetensors; "
                "train this network again"
            )
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def file_checksum(path: Path) -> str:
    """Return the first 16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
