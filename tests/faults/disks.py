"""A full disk, a limit on the size of files, and a read-only disk, at every stage.

As root, a small file system in memory is mounted, filled, made read-only, and made larger again.
Otherwise only the limit on the size of files is tested.
"""

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import commands
from faults.commands import CONFIG, RESULTS, SELECTION
from faults.results import Counts, contents, differences, leftovers, stoppable

from robsparse.study.study import Study

SHARES = (0.0, 0.2, 0.5, 0.8)  # of what a stage writes
LIMITS = (0, 200, 2_000, 10_000)  # bytes of a file
LARGE = 1 << 28


@dataclass(frozen=True)
class Stage:
    """A command that writes results, in a folder with all that it needs."""

    name: str
    words: tuple[str, ...]
    before: Path
    after: dict[str, str]


def stages(study: Study, folder: Path) -> Iterator[Stage]:
    """The stages of a study, in order. `folder` has all that the next one needs."""
    [cell] = study.cells()
    job = (CONFIG, "--cell", cell.key)
    commands_of = {
        "train": ("train", *job),
        "evaluate": ("evaluate", *job, "--selection", SELECTION),
        "export": ("export", *job, "--selection", SELECTION, "--format", "compact"),
        "collect": ("collect", CONFIG),
        "figures": ("figures", CONFIG),
    }
    for name, words in commands_of.items():
        after = folder.with_name("after")
        _reset(folder, after)
        assert commands.run(words, after).code == 0
        yield Stage(name, words, folder, contents(after / RESULTS))
        _reset(after, folder)


def full_disks(folder: Path, scratch: Path, wanted: Sequence[str] = ()) -> Counts:
    """Run each stage with too little space, and on a read-only disk; then again with space.

    wanted: names of stages; all of them if it is empty.
    """
    counts = Counts()
    study = commands.make_study(folder, ("bcs",))
    scratch.mkdir()
    with stoppable():
        for stage in stages(study, folder):
            if wanted and stage.name not in wanted:
                continue
            for size in LIMITS:
                limit = functools.partial(commands.limit_files, size)
                _try(stage, scratch, f"{stage.name}: limit of file size", counts, change=limit)
            if os.geteuid() == 0:
                with _disk(scratch) as resize:
                    _fill(stage, scratch, resize, counts)
    return counts


def _fill(stage: Stage, folder: Path, resize: Callable[..., None], counts: Counts) -> None:
    """Run a stage on a disk that becomes full, and on a read-only one."""
    growth = _growth(stage, folder)
    for share in SHARES:
        fill = functools.partial(resize, int(share * growth))
        _try(stage, folder, f"{stage.name}: full disk", counts, before=fill, after=resize)
    read_only = functools.partial(resize, None)
    _try(stage, folder, f"{stage.name}: read-only disk", counts, before=read_only, after=resize)


def _try(
    stage: Stage,
    folder: Path,
    name: str,
    counts: Counts,
    *,
    change: Callable[[], None] = commands.nothing,
    before: Callable[[], None] = commands.nothing,
    after: Callable[[], None] = commands.nothing,
) -> None:
    """Run a stage with a fault and then without it; judge both."""
    _reset(stage.before, folder)
    old = _bytes(folder)
    before()
    ended = commands.run(stage.words, folder, change)
    after()
    found = _bytes(folder)
    wrong = [
        *leftovers(folder),
        *(path for path, content in old.items() if found.get(path) != content),
    ]
    again = commands.run(stage.words, folder)
    wrong += [str(again)] if again.code else differences(stage.after, contents(folder / RESULTS))
    counts.judge(name, ended, str(RESULTS), wrong)


def _growth(stage: Stage, folder: Path) -> int:
    """The bytes of the disk that a stage writes."""
    _reset(stage.before, folder)
    used = _used(folder)
    assert commands.run(stage.words, folder).code == 0
    return _used(folder) - used


def _used(folder: Path) -> int:
    disk = os.statvfs(folder)
    return (disk.f_blocks - disk.f_bfree) * disk.f_frsize


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Callable[..., None]]:
    """Mount a disk in memory; yield a function that makes it full, read-only, or large again."""
    _mount("-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", folder)

    def resize(free: int | None = LARGE) -> None:
        """Leave so many bytes; None: make it read-only."""
        size = "ro" if free is None else f"rw,size={max(_used(folder) + free, 1)}"
        _mount("-o", f"remount,{size}", folder)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


def _reset(source: Path, folder: Path) -> None:
    """Make a folder a copy of another one; the folder itself may be a mounted disk."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path)
    shutil.copytree(source, folder, dirs_exist_ok=True)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }
