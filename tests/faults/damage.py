"""Damaged files of every kind that a study writes, and weight files of random bytes.

The files are found by a walk through the folder of a finished study, so a new kind of file is
included by itself. A file belongs to a command if the command reads it: the time of last access
shows this (not on a file system that is mounted with noatime; then all files belong to all).
"""

import functools
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from faults import commands
from faults.commands import CONFIG, RESULTS, SELECTION
from faults.results import Counts, contents, differences, stoppable

from robsparse.study.study import Study

_NUMBER = re.compile(rb"(?<=[ ,:\[])-?\d+\.?\d*(?=[,\n\]}])")


def _flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _word(content: bytes, draw: random.Random) -> bytes:
    """Put a word in the place of a number, if the file is text."""
    places = [*_NUMBER.finditer(content)] if b"\0" not in content else []
    if not places:
        return content[: len(content) // 3]
    place = draw.choice(places)
    word = b'"many"' if content.lstrip().startswith(b"{") else b"many"
    return content[: place.start()] + word + content[place.end() :]


# Name -> (content, random numbers) -> the damaged content; None: a folder in the place of the file.
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "zero bytes": lambda content, draw: b"",
    "truncated": lambda content, draw: content[: draw.randrange(1, max(2, len(content)))],
    "random bytes": lambda content, draw: draw.randbytes(max(1, len(content))),
    "one bit flipped": _flipped,
    "a word where a number is due": _word,
    "a folder in its place": lambda content, draw: None,
}


@dataclass(frozen=True)
class Reader:
    """A command on an undamaged study: the files that it reads, and the results after it."""

    words: tuple[str, ...]
    read: frozenset[Path]
    expected: dict[str, str]


def finished_study(folder: Path) -> Study:
    """Make a finished study with the states of an interrupted training and evaluation."""
    study = commands.make_study(folder, ("dense", "lwm", "bcs"))
    for _, _, words in commands.jobs(study):
        assert commands.run(words, folder).code == 0
    for words in (("collect", CONFIG), ("figures", CONFIG)):
        assert commands.run(words, folder).code == 0
    _interrupt(study, folder)
    return study


def _interrupt(study: Study, folder: Path) -> None:
    """Stop a training twice and an evaluation once, as a power cut does: without cleaning up."""
    [cell] = [cell for cell in study.cells() if cell.method == "bcs"]
    results = folder / RESULTS
    kept = folder / "kept"
    shutil.copytree(results, kept)
    for steps in (8, 6):
        stop = functools.partial(commands.stop_after_steps, steps)
        ended = commands.run(("train", CONFIG, "--cell", cell.key), folder, stop)
        assert ended.code == 75, ended
    ended = commands.run(
        ("evaluate", CONFIG, "--cell", cell.key, "--selection", SELECTION),
        folder,
        functools.partial(commands.stop_after_parts, 2),
    )
    assert ended.code != 0, ended
    shutil.copytree(results / "resume", kept / "resume", dirs_exist_ok=True)
    shutil.rmtree(results)
    kept.rename(results)


def readers(study: Study, folder: Path, scratch: Path) -> list[Reader]:
    """All commands that read results, with the files that they read."""
    keys = {cell.method: cell.key for cell in study.cells()}
    listed: list[tuple[str, ...]] = [
        ("train", CONFIG, "--cell", keys["bcs"]),  # continues
        ("train", CONFIG, "--cell", keys["lwm"]),  # starts from another network
        ("evaluate", CONFIG, "--cell", keys["bcs"], "--selection", SELECTION),
        ("export", CONFIG, "--cell", keys["bcs"], "--selection", SELECTION, "--format", "compact"),
        ("collect", CONFIG),
        ("figures", CONFIG),
        ("compare", str(RESULTS), str(RESULTS)),
    ]
    found = []
    for words in listed:
        copy = _copy(folder, scratch)
        files = list(_files(copy / RESULTS))
        for path in files:
            os.utime(path, ns=(0, path.stat().st_mtime_ns))
        ended = commands.run(words, copy)
        assert ended.code == 0, ended
        read = {p.relative_to(copy) for p in files if not p.exists() or p.stat().st_atime_ns}
        found.append(Reader(words, frozenset(read), contents(copy / RESULTS)))
    return found


def damage_files(
    study: Study, folder: Path, scratch: Path, number: int, draw: random.Random
) -> Counts:
    """Damage at least `number` files: all kinds in all ways; run each command that reads them."""
    counts = Counts()
    every = readers(study, folder, scratch)
    cases = [
        (path, name)
        for paths in _by_kind(folder).values()
        for name in DAMAGES
        for path in [draw.choice(paths)]
    ]
    print(f"{len(cases)} files of {len(cases) // len(DAMAGES)} kinds", flush=True)
    draw.shuffle(cases)
    with stoppable():
        for path, name in cases[: max(number, 1)]:
            own = [one for one in every if path in one.read]
            if not own:
                counts.add(name, "no effect")  # no command reads it
            for reader in own:
                _damage((path, name), reader, _copy(folder, scratch), draw, counts)
    return counts


def _damage(
    case: tuple[Path, str], reader: Reader, folder: Path, draw: random.Random, counts: Counts
) -> None:
    """Damage a file in a copy of the study, run a command that reads it, and judge it."""
    name, place = case[1], folder / case[0]
    before = place.read_bytes()
    content = DAMAGES[name](before, draw) if before else b"x"
    place.unlink()
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    ended = commands.run(reader.words, folder)
    if place.is_dir():
        place.rmdir()
        place.write_bytes(before)
    elif place.exists() and place.read_bytes() == content:
        place.write_bytes(before)
    wrong = differences(reader.expected, contents(folder / RESULTS)) if not ended.code else []
    counts.judge(name, ended, place.name, wrong)


def _by_kind(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """The files of a study by folder and name without what names a network or a plot."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    for path in _files(folder / RESULTS):
        parts = path.relative_to(folder / RESULTS).parts
        name = re.sub(r"^[0-9a-f]{24}", "*", path.name)
        name = name if parts[0] in ("models", "evaluations", "resume") or len(parts) == 1 else "*"
        kinds.setdefault(("/".join(parts[:1]), name + path.suffix), []).append(
            path.relative_to(folder)
        )
    return kinds


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _copy(folder: Path, scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(folder, scratch)
    return scratch


def _changed(content: bytes, draw: random.Random) -> bytes:
    """Return random bytes, or the content with some random bytes."""
    if draw.random() < 0.5:
        return draw.randbytes(draw.randrange(0, 3000))
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 6)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def random_weights(folder: Path, number: int, draw: random.Random) -> Counts:
    """Evaluate weight files of random bytes, and good files with random changes."""
    counts = Counts()
    good = {"weights.pt": folder / "good.pt", "weights.safetensors": folder / "good.safetensors"}
    torch.save({"0.weight": torch.ones(4, 1, 3, 3)}, good["weights.pt"])
    safetensors.numpy.save_file({"0.weight": np.ones((4, 1, 3, 3))}, good["weights.safetensors"])
    for _ in range(number):
        name = draw.choice(sorted(good))
        (folder / name).write_bytes(_changed(good[name].read_bytes(), draw))
        words = ("evaluate", "--weights", name, "--arch", "small_cnn", "--dataset", "digits")
        ended = commands.run((*words, "--attacks", "clean", "--n-examples", "4"), folder)
        accepted = [f"{name} was accepted"] if ended.code == 0 else []
        counts.judge("weights of random bytes", ended, name, accepted)
    return counts
