"""Compares two ways of doing one thing here: in turn, warmed up, by medians and peak memory.

The clock is that of `torch.utils.benchmark`, which waits for the device. Its own `Timer` measures
one side only and does at least two runs before each that it measures: here the two sides take
turns, so that both see the same load of the machine, and AutoAttack is too long to run it thrice.
"""

import ctypes
import functools
import gc
import statistics
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark


@dataclass(frozen=True)
class Comparison:
    """One comparison of ours with a rival, both in `unit`, e.g. images a second.

    limit: what the machine's measured rate would allow at the precision of ours, limit_share: ours
    of it; None where no rate bounds it. memory_mb, rival_memory_mb: peak beyond what lay in memory
    before the work began; None where it cannot be measured.
    """

    case: str
    unit: str
    ours: float
    rival: float
    rival_name: str
    ratio: float
    limit: float | None = None
    limit_share: float | None = None
    memory_mb: float | None = None
    rival_memory_mb: float | None = None


@dataclass(frozen=True)
class Side:
    """What is timed; `prepare` runs before each time and is not."""

    work: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Stopwatch:
    """Times both sides in turn, `repeats` times each after one that does not count."""

    device: torch.device
    repeats: int

    def compare(
        self,
        case: str,
        ours: Side,
        theirs: Side,
        rival_name: str,
        *,
        count: int,
        unit: str = "images/s",
        limit: float | None = None,
        warm_up: bool = True,
    ) -> Comparison:
        """Median rates of `count` things each; memory is that of the last time."""
        seconds: tuple[list[float], list[float]] = ([], [])
        memory: list[float | None] = [None, None]
        for turn in range(self.repeats + warm_up):
            for number, side in enumerate((ours, theirs)):
                taken, memory[number] = self.time(side)
                if turn >= warm_up:
                    seconds[number].append(taken)
        mine, other = (count / statistics.median(values) for values in seconds)
        share = None if limit is None else mine / limit
        ratio = mine / other
        return Comparison(case, unit, mine, other, rival_name, ratio, limit, share, *memory)

    def time(self, side: Side) -> tuple[float, float | None]:
        """Seconds, and the peak memory in MB beyond what lay there before."""
        side.prepare()
        before = self._start_peak()
        taken = timeit.Timer(side.work, gc.enable, benchmark.timer).timeit(1)
        return taken, None if before is None else self._peak() - before

    def _start_peak(self) -> float | None:
        """Forget the peak so far; memory in MB that is taken now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        if not sys.platform.startswith("linux"):
            return None
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken next
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        return _resident("VmRSS")

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return _resident("VmHWM")


def _resident(key: str) -> float:
    """A line of Linux's account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(kilobytes) / 2**10


@functools.cache
def multiply_rate(device: torch.device, precision: str) -> float:
    """Operations a second of the fastest large matrix product or convolution: the limit.

    On some processors a convolution is much faster than a matrix product of the same library.
    precision: fp32, tf32 or bf16 (in fp32, as `machine.computing` has set it).
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n, images = (8192, 256) if device.type == "cuda" else (2048, 32)
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    rates = [2 * n**3 / _shortest(lambda: a @ b)]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(images, 256, 16, 16, device=device)
        weight = torch.rand(256, 256, 3, 3, device=device)
        x, weight = (t.to(dtype).contiguous(memory_format=memory_format) for t in (x, weight))
        convolve = functools.partial(torch.nn.functional.conv2d, x, weight, padding=1)
        rates.append(2 * images * 256 * 256 * 9 * 16 * 16 / _shortest(convolve))
    return max(rates)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes a second that copying reads and writes, the best of several."""
    block = torch.rand(2**26, device=device)
    return 2 * block.nbytes / _shortest(block.clone)


def _shortest(work: Callable[[], Any]) -> float:
    """Seconds of one run, the least of those of half a second."""
    threads = torch.get_num_threads()
    timer = benchmark.Timer("work()", globals={"work": work}, num_threads=threads)
    return min(timer.blocked_autorange(min_run_time=0.5).times)
