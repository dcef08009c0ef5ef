"""Shows how far a study has run: one live display on a terminal, a line for each job in a log.

Snakemake reports each job as an event to a logger plugin. `logger_plugin` makes one that keeps a
`Progress` up to date; what a running job does now is read from its log file.
"""

import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from snakemake_interface_logger_plugins.base import LogHandlerBase

from robsparse.base.files import is_full

TRAIN, EVALUATE = "train", "evaluate"  # rules of the workflow
_STOPPED = "Terminating processes on user request"  # a message of snakemake after a signal
_JOB_STOPPED = "robsparse: stopped"  # the last message of a job after a signal
_EPOCH = re.compile(r"(\S+ epoch \d+/\d+):.*?(?: val_robust (\d\.\d+)|$)")
_ATTACK = re.compile(r"(\S+): (\d+)/(\d+) correct")
_TAIL = 4096  # bytes of a log that are read for the state of its job


@dataclass(frozen=True)
class Job:
    """A job of the workflow. cell: the key of its network, or ""; began: its start in seconds."""

    rule: str
    what: str
    cell: str
    log: Path | None
    began: float

    def state(self) -> str:
        """What the job does now, or did last, from its log; "" if that is not known."""
        return state_of(self.log) if self.log else ""


@dataclass
class Progress:
    """The jobs of one run of the workflow.

    networks, evaluations: numbers that are done at the end, with those of earlier runs.
    clock: the time in seconds.
    planned: whether the jobs of the run are known.
    left: jobs that are not finished, by rule.
    failed: failed jobs by number.
    stopped: jobs by number that a signal has stopped.
    messages: errors of snakemake itself.
    """

    networks: int
    evaluations: int
    clock: Callable[[], float] = time.monotonic
    planned: bool = False
    left: Counter[str] = field(default_factory=Counter)
    running: dict[int, Job] = field(default_factory=dict)
    failed: dict[int, Job] = field(default_factory=dict)
    stopped: dict[int, Job] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    at_once: int = 1
    interrupted: bool = False
    messages: list[str] = field(default_factory=list)

    def plan(self, jobs: Mapping[str, int]) -> None:
        """Set the jobs of the run: their number by rule."""
        self.planned = True
        self.left = Counter({rule: jobs.get(rule, 0) for rule in (TRAIN, EVALUATE)})

    def start(self, number: int, job: Job) -> None:
        """A job starts, perhaps again."""
        self.failed.pop(number, None)
        self.stopped.pop(number, None)
        self.running[number] = job
        self.at_once = max(self.at_once, len(self.running))

    def end(self, number: int, failed: bool = False) -> Job | None:
        """A job ends. Returns the job; None if a signal stopped it or if it has ended before."""
        job = self.running.pop(number, None)
        if job is None:
            return None
        if failed and reason_of(job.log).startswith(_JOB_STOPPED):
            self.stopped[number] = job
            return None
        if failed:
            self.failed[number] = job
        else:
            self.left[job.rule] -= job.rule in self.left
            self.seconds.setdefault(job.rule, []).append(self.clock() - job.began)
        return job

    def seconds_left(self) -> float | None:
        """The estimated time to the end; None before the first job has ended.

        A job that is left takes the mean time of the jobs of its rule, or of all jobs if none of
        its rule has ended. As many run at once as have run at once so far.
        """
        everything = [second for own in self.seconds.values() for second in own]
        if not everything:
            return None
        now, total = self.clock(), 0.0
        for rule, number in self.left.items():
            own = self.seconds.get(rule, everything)
            mean = sum(own) / len(own)
            begun = [min(now - j.began, mean) for j in self.running.values() if j.rule == rule]
            failed = sum(job.rule == rule for job in self.failed.values())
            total += (number - failed) * mean - sum(begun)
        return max(total, 0.0) / self.at_once

    def __str__(self) -> str:
        if not self.planned:
            return "listing the jobs"
        parts = [
            f"{self.networks - self.left[TRAIN]} of {self.networks} networks trained",
            f"{self.evaluations - self.left[EVALUATE]} of {self.evaluations} attacked",
        ]
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        left = self.seconds_left()
        if left is not None and any(self.left.values()):
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    @property
    def share(self) -> float:
        """The share of trainings and evaluations that are done, in [0,1]."""
        whole = self.networks + self.evaluations
        return 1 - sum(self.left.values()) / whole if self.planned and whole else 0.0


def duration(seconds: float) -> str:
    """A time in words: 41 s, 12 min, 30 h."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.0f} h"


def state_of(log: Path) -> str:
    """Stage and robust accuracy of a job from the end of its log; "" if there is none yet."""
    for line in reversed(_last_lines(log)):
        if found := _EPOCH.match(line):
            robust = found[2] and f", robust {100 * float(found[2]):.1f} % (validation)"
            return f"{found[1]}{robust or ''}"
        if found := _ATTACK.match(line):
            return f"{found[1]} {100 * int(found[2]) / int(found[3]):.1f} %"
    return ""


def reason_of(log: Path | None) -> str:
    """Why a job failed: its own error message, or the last line of its log."""
    lines = [line.strip() for line in _last_lines(log) if line.strip()] if log else []
    own = [line for line in lines if line.startswith("robsparse: error: ")]
    if own:
        return own[-1].removeprefix("robsparse: error: ")
    if not lines and log and is_full(log.parent):
        return f"{log.parent}: the disk is full, so there is not even a log; free some space"
    return lines[-1] if lines else "it wrote no message"


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as handle:
            handle.seek(max(0, log.stat().st_size - _TAIL))
            return handle.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []


class Lines:
    """Prints one line for each job that ends: for a log."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def start(self) -> None:
        """Nothing is shown before the first job ends."""

    def stop(self) -> None:
        """Nothing is left to show."""

    def ended(self, job: Job, text: str) -> None:
        """Print the job and how far the run is."""
        if job.log:  # other jobs, like `all`, do nothing
            print(f"{text} [{self.progress}]", file=sys.stderr, flush=True)


class Display:
    """A live display on a terminal: a bar, and a line for each running job."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.console = Console(stderr=True)
        self.live = Live(
            console=self.console,
            get_renderable=self._picture,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> None:
        """Start to draw."""
        self.live.start()

    def stop(self) -> None:
        """Remove the display."""
        self.live.stop()

    def ended(self, job: Job, text: str) -> None:
        """Print a failed job above the display."""
        if job in self.progress.failed.values():
            self.console.print(Text(text, style="bold red"))

    def _picture(self) -> Group:
        progress = self.progress
        top = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=1.0, completed=progress.share, width=24)
        top.add_row(bar, Text(str(progress), overflow="ellipsis", no_wrap=True))
        jobs = Table.grid(padding=(0, 2))
        for job in list(progress.running.values()):
            spent = duration(progress.clock() - job.began)
            jobs.add_row(f"  {job.what}", Text(job.state(), style="bold"), spent)
        return Group(top, jobs)


def logger_plugin(progress: Progress, view: Lines | Display) -> Any:
    """Return a logger plugin for snakemake's registry, with a handler that updates `progress`."""

    class LogHandler(LogHandlerBase):
        writes_to_stream = True
        writes_to_file = False
        has_filter = True
        has_formatter = True
        needs_rulegraph = False

        def emit(self, record: logging.LogRecord) -> None:
            update(progress, view, record)

    return SimpleNamespace(LogHandler=LogHandler)


def update(progress: Progress, view: Lines | Display, record: logging.LogRecord) -> None:
    """Bring `progress` up to date with an event of snakemake, and show it."""
    event, data = str(getattr(record, "event", "") or ""), vars(record)
    if event == "run_info":
        progress.plan(data["stats"])
    elif event == "job_info":
        progress.start(data["jobid"], _job(data, progress.clock()))
    elif event in ("job_finished", "job_error"):
        numbers = data.get("job_ids") or [data.get("job_id", data.get("jobid"))]
        for number in numbers:
            if job := progress.end(number, failed=event == "job_error"):
                view.ended(job, _ended(job, progress, failed=event == "job_error"))
    elif not event and record.getMessage().startswith(_STOPPED):
        progress.interrupted = True
    elif not event and record.levelno >= logging.ERROR:
        progress.messages += record.getMessage().splitlines()


def _job(data: Mapping[str, Any], now: float) -> Job:
    """The job of an event. Its message names it, like `train KEY` or `attack KEY (last)`."""
    what = data["rule_msg"] or data["rule_name"]
    words = str(what).split()
    has_cell = data["rule_name"] in (TRAIN, EVALUATE) and len(words) > 1
    logs: Iterable[str] = data["log"] or ()
    log = next((Path(name) for name in logs), None)
    return Job(data["rule_name"], what, words[1] if has_cell else "", log, now)


def _ended(job: Job, progress: Progress, failed: bool) -> str:
    if failed:
        return f"failed: {job.what}: {reason_of(job.log)}"
    state, spent = job.state(), duration(progress.clock() - job.began)
    return f"{job.what}: done in {spent}{f', {state}' if state else ''}"
