"""Kills of single jobs, of `snakemake` and of `robsparse run`, at random moments.

After the kills the same commands run to their end. All results must equal those of commands that
were not killed, bit for bit.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from faults import commands
from faults.commands import CONFIG, RESULTS, ROOT
from faults.results import Counts, contents, differences, stoppable

from project import ENVIRONMENT
from robsparse.study.study import Study

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WORKFLOWS = (
    ("snakemake", "--cores", "2", "evaluated", "--configfile", CONFIG),
    ("robsparse", "run", CONFIG, "--cores", "2"),
)
OF_WORKFLOWS = ("dense", "bcs", "hydra")


@dataclass(frozen=True)
class Undisturbed:
    """A study that ran without a fault: the seconds of each job by its command, and results."""

    study: Study
    seconds: dict[tuple[str, ...], float]
    expected: dict[str, str]


def undisturbed(study: Study, folder: Path) -> Undisturbed:
    """Run all jobs of a study, and collect."""
    seconds = {}
    for _, _, words in commands.jobs(study):
        ended = commands.run(words, folder)
        assert ended.code == 0, ended
        seconds[words] = ended.seconds
    assert commands.run(("collect", CONFIG), folder).code == 0
    return Undisturbed(study, seconds, contents(folder / RESULTS))


def kill_all(folder: Path, number: int, draw: random.Random, methods: Sequence[str] = ()) -> Counts:
    """Kill jobs of all methods, then `snakemake` and `robsparse run`: about `number` kills.

    Args:
        folder: an empty folder.
        number: of kills; a small one only kills jobs.
        draw: random numbers.
        methods: those of the study; all that are registered if it is empty.
    """
    counts = Counts()
    quiet, place = folder / "undisturbed", folder / "jobs"
    run = undisturbed(commands.make_study(quiet, methods), quiet)
    commands.make_study(place, methods)
    with stoppable():
        done = kill_jobs(run, place, 2, draw, counts)
        compare(place, run.expected, "kills of jobs", counts)
        if number > max(done, 6):
            _kill_workflows(folder, max(4, (number - done + 1) // 2), draw, counts)
    return counts


def _kill_workflows(folder: Path, each: int, draw: random.Random, counts: Counts) -> None:
    """Kill each of WORKFLOWS some times, on a study of three methods."""
    quiet = folder / "small"
    run = undisturbed(commands.make_study(quiet, OF_WORKFLOWS), quiet)
    for words in WORKFLOWS:
        place = folder / words[0]
        commands.make_study(place, OF_WORKFLOWS)
        make_project(place)
        kill_workflow(words, place, each, draw, counts)
        compare(place, run.expected, f"kills of {words[0]}", counts)


def kill_jobs(
    run: Undisturbed, folder: Path, each: int, draw: random.Random, counts: Counts
) -> int:
    """Kill each training `each` times and each evaluation once; return the number of kills.

    A checkpoint is saved at the end of every epoch, so that some kills find one.
    """
    kills = 0
    for kind, cell, words in commands.jobs(run.study):
        for _ in range(each if kind == "train" else 1):
            signum = SIGNALS[kills % len(SIGNALS)]
            running = commands.start(words, folder, commands.save_every_epoch)
            time.sleep(draw.uniform(0.02, 0.7 * run.seconds[words]))
            running.kill(signum)
            ended = running.wait()
            if ended.code == 0:  # it was faster
                continue
            kills += 1
            bad = ended.crashed or ended.code not in (75, 130, -signum)
            name = f"{signum.name} of a job, then again"
            counts.add(name, "traceback" if bad else "no effect", f"{cell.key}: {ended}")
        ended = commands.run(words, folder)
        if ended.code:
            counts.add("the same job again", "lost or different", str(ended))
        own = {name: found for name, found in run.expected.items() if f"/{cell.key}/" in name}
        if kind == "train":
            own = {name: found for name, found in own.items() if name.startswith("models/")}
        for one in differences(own, contents(folder / RESULTS)):
            counts.add("results after kills of jobs", "lost or different", one)
        print(f"{kind} {cell.key}: {len(own)} results compared after kills", flush=True)
    return kills


def kill_workflow(
    words: Sequence[str], folder: Path, kills: int, draw: random.Random, counts: Counts
) -> None:
    """Start a workflow again and again; kill it, all its processes, or one of its jobs."""
    targets = ("run", "all", "job")
    done = 0
    while done < kills:
        signum, target = SIGNALS[done % len(SIGNALS)], targets[done // 2 % len(targets)]
        process = _start(words, folder)
        end = time.monotonic() + 600
        while process.poll() is None and not _jobs_of(process) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 8))
        if process.poll() is None:
            _send(process, signum, target)
            name = {"run": words[0], "all": f"{words[0]} and its jobs", "job": "a job of a run"}
            text = _wait(process, folder)
            bad = "Traceback" in text
            row = f"{signum.name} of {name[target]}, then again"
            counts.add(row, "traceback" if bad else "no effect", text[-1500:])
            done += 1
        elif process.returncode == 0:
            _wait(process, folder)
            shutil.rmtree(folder / RESULTS)  # begin again
        else:
            counts.add(f"{words[0]} again", "lost or different", _wait(process, folder)[-1500:])
            done += 1
    process = _start(words, folder)
    text = _wait(process, folder)
    if process.returncode:
        counts.add(f"{words[0]} again", "lost or different", text[-1500:])


def compare(folder: Path, expected: dict[str, str], name: str, counts: Counts) -> None:
    """Collect, and compare all results with those of an undisturbed run."""
    ended = commands.run(("collect", CONFIG), folder)
    if ended.code:
        counts.add(f"results after {name}", "lost or different", str(ended))
        return
    wrong = differences(expected, contents(folder / RESULTS))
    for one in wrong:
        counts.add(f"results after {name}", "lost or different", one)
    if not wrong:
        print(f"after {name}: {len(expected)} results are equal, bit for bit", flush=True)


def make_project(folder: Path) -> None:
    """Copy the files of the workflow."""
    for name in ("rules", "profiles", "report"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    shutil.copy(ROOT / "Snakefile", folder)


def _start(words: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a workflow in a process group of its own, as a terminal does."""
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )


def _wait(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait for the end of a workflow and of its jobs; return what they printed."""
    process.wait(timeout=1800)
    while _group(process.pid):
        time.sleep(0.05)
    logs = (folder / RESULTS / "logs").rglob("*.log")
    return "".join(path.read_text(errors="replace") for path in (*logs, folder / "printed"))


def _group(pgid: int) -> list[psutil.Process]:
    """The living processes of a process group."""
    found = []
    for one in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(one.pid) == pgid and one.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(one)
        except ProcessLookupError:
            pass
    return found


def _jobs_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The jobs of a workflow: processes with --cell among their words."""
    found = []
    for one in _group(process.pid):
        try:
            if "--cell" in one.cmdline():
                found.append(one)
        except psutil.Error:
            pass
    return found


def _send(process: subprocess.Popen[str], signum: signal.Signals, target: str) -> None:
    jobs = _jobs_of(process)
    if target == "job" and jobs:
        os.kill(jobs[0].pid, signum)
    elif target == "all":
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
