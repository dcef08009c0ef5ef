"""The GPUs of this machine, and the one that a job takes. This module does not import torch.

A GPU is taken by the lock of a file, so two jobs never take the same place. The kernel releases the
lock when the job ends, also after a kill.
"""

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SECONDS = 1.0  # between two looks for a free GPU


def visible() -> list[str]:
    """Return the names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES.

    If this variable is not set, these are the numbers of all NVIDIA GPUs that the driver reports.
    """
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(len(_uuids()))]
    names = [name.strip() for name in named.split(",")]
    return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))


@contextmanager
def one_reserved(jobs_per_gpu: int) -> Iterator[None]:
    """Inside the block, this process sees one GPU only, which at most `jobs_per_gpu` jobs share.

    It waits until a GPU is free. Jobs are spread over the GPUs before two of them share one. If
    CUDA_VISIBLE_DEVICES already names a single GPU, the cluster or the user has chosen, and nothing
    is locked. Without a GPU, nothing is done.
    """
    names, before = visible(), os.environ.get(VISIBLE)
    if not names or (before is not None and len(names) == 1):
        yield
        return
    lock, os.environ[VISIBLE] = _wait_for_place(names, jobs_per_gpu)
    print(f"GPU {os.environ[VISIBLE]} of {', '.join(names)}", flush=True)
    try:
        yield
    finally:
        lock.release()
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before


def _wait_for_place(names: list[str], jobs_per_gpu: int) -> tuple[filelock.BaseFileLock, str]:
    """Wait for a free place on one of the GPUs. Return its lock and the name of the GPU."""
    if found := _free_place(names, jobs_per_gpu):
        return found
    print(
        f"waiting for a free GPU (of {len(names)}, machine.jobs_per_gpu = {jobs_per_gpu}); "
        f"a job does not wait if {VISIBLE} names one GPU",
        flush=True,
    )
    while not (found := _free_place(names, jobs_per_gpu)):
        time.sleep(_SECONDS)
    return found


def _free_place(names: list[str], jobs_per_gpu: int) -> tuple[filelock.BaseFileLock, str] | None:
    """Lock the first free place: one on each GPU, then a second one on each. None: no place."""
    folder = Path(tempfile.gettempdir(), f"robsparse-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    identities = _identities(names)
    for place, name in itertools.product(range(jobs_per_gpu), names):
        lock = filelock.FileLock(folder / f"{identities[name]}.{place}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            continue
        return lock, name
    return None


def _identities(names: list[str]) -> dict[str, str]:
    """Return the UUIDs of GPUs. In two containers, the same number may be two different GPUs."""
    numbered = {str(number): uuid for number, uuid in enumerate(_uuids())}
    return {name: numbered.get(name, name) for name in names}


def _uuids() -> list[str]:
    """Return the UUIDs of the NVIDIA GPUs in the order of the driver; none without a driver."""
    words = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.split()
