"""The runs of Snakemake in a folder, so that the lock of a killed run does not stop the next one.

Snakemake locks its files until its end, and a killed run leaves this lock. It has no process id.
Therefore each run of our workflow also locks a file of its own; the kernel releases this lock when
the process ends.
"""

import contextlib
import os
import shutil
import socket
import sys
from pathlib import Path

import filelock

from robsparse.base.files import check_writable


def begin_run(state: Path) -> filelock.BaseFileLock:
    """Register this run until its process ends. Remove the lock of Snakemake if its run is dead.

    The lock stays if another run may be alive: one whose file is locked, or one of another host,
    where file locks may not be seen. Then one line says so.

    Args:
        state: the folder .snakemake.

    Returns:
        The lock of this run. It is released when it is deleted.

    Raises:
        UsageError: if the folder cannot be written to.
        RunError: if the disk is full or fails.
    """
    runs, host = state / "runs", socket.gethostname()
    check_writable(runs)
    own = filelock.FileLock(runs / f"{host}.{os.getpid()}")
    with contextlib.suppress(filelock.Timeout):  # an earlier run of this process has it
        own.acquire(timeout=0)
    others = [path for path in sorted(runs.iterdir()) if path != Path(own.lock_file)]
    dead = [path for path in others if path.stem == host and not _is_locked(path)]
    alive = [path.name for path in others if path not in dead]
    locked = any(state.glob("locks/*.lock"))
    if locked and alive:
        print(
            f"robsparse: the lock of Snakemake is kept, because these runs may be alive (host and "
            f"process): {', '.join(alive)}; if they have ended: snakemake --unlock, and remove "
            f"their files in {runs}",
            file=sys.stderr,
        )
        return own
    if locked and dead:
        shutil.rmtree(state / "locks")
        print("robsparse: removed the lock of a run that was killed", file=sys.stderr)
    for path in dead:
        path.unlink(missing_ok=True)
    return own


def _is_locked(path: Path) -> bool:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False
