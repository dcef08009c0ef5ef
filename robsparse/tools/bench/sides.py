"""The two sides of a benchmark: our training step and its parts, and those of the textbook."""

import dataclasses
import functools
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.compute.machine import (
    computing,
    fast_memory_format,
    prepare,
)
from robsparse.evaluation.measure import measure_network
from robsparse.schema.threat import Crafting
from robsparse.schema.training import Training
from robsparse.sparsity.budgets import erk_keep_counts
from robsparse.sparsity.layers import prunable, trained_weight
from robsparse.sparsity.masks import random_masks
from robsparse.study.cost import PASSES
from robsparse.tools.stopwatch import Side, Stopwatch, multiply_rate
from robsparse.training import objectives
from robsparse.training.loop import compute_gradients, update
from robsparse.training.stages import Run, Stage, begin_stage

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
CLASSES = 10
SMALL = ("small_cnn", "small_resnet")
SMALL_SIZE, SIZE = 8, 32  # pixels of a side, for the small networks and for the others
WIDTHS = {8: 24, 32: 32}  # of the small networks: those of the quick study and of the photographs
DEATHS = 0.001  # share of the active connections that become dormant, in a step that is rewired
TOGETHER = 20  # steps of each network that are timed together


@dataclass(frozen=True)
class Step:
    """A kind of training step of ours; `layers` is what the textbook has for the method.

    sparse_compute: the training pass computes with active weights only (`training.sparse_compute`).
    """

    arch: str
    objective: str
    precision: str
    method: str = "dense"
    sparsity: float = 0.0
    layers: str | None = None
    sparse_compute: bool = False

    def __str__(self) -> str:
        names = (self.arch, self.objective, self.method, f"{self.sparsity:g}", self.precision)
        return " ".join(names)


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often.

    only: a part of the names of the cases that are run.
    size: pixels of a side of the images, or 0: 8 for the small networks and 32 for the others.
    """

    archs: tuple[str, ...]
    precisions: tuple[str, ...]
    batch_size: int
    images: int
    repeats: int
    threads: int
    only: str
    device: torch.device
    size: int = 0

    @property
    def watch(self) -> Stopwatch:
        """What times a pair."""
        return Stopwatch(self.device, self.repeats)

    def shape(self, arch: str) -> tuple[int, int, int]:
        """The shape of the images: one channel for 8x8 pixels, otherwise three."""
        size = self.size or (SMALL_SIZE if arch in SMALL else SIZE)
        return (1 if size == SMALL_SIZE else 3, size, size)

    def wants(self, case: str) -> bool:
        """Whether a case of this name is to be run."""
        return self.only in case


@functools.cache
def load_textbook() -> ModuleType:
    """benchmarks/textbook.py of the checkout. Raises UsageError where there is none."""
    path = Path(__file__).parents[3] / "benchmarks" / "textbook.py"
    if not path.exists():
        raise UsageError(f"{path}: not there; bench runs in a checkout of the repository")
    spec = importlib.util.spec_from_file_location("textbook", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(arch: str, settings: Settings, sparsity: float = 0.0) -> nn.Module:
    """A network with random weights, of which a share is 0: shares of layers by ERK."""
    torch.manual_seed(0)
    model = models.build(arch, params_of(arch, settings), settings.shape(arch), CLASSES)
    if sparsity:
        masks = random_masks(model, erk_keep_counts(model, sparsity), torch.Generator())
        for name, module in prunable(model).items():
            module.weight.data.mul_(masks[name])
    return model.to(settings.device)


def params_of(arch: str, settings: Settings) -> BaseModel:
    """Settings of an arch. The small networks have a width that fits the size of the images."""
    width = WIDTHS.get(settings.shape(arch)[1]) if arch in SMALL else None
    return registry.entry("arch", arch).params(**({"width": width} if width else {}))


def images_of(arch: str, settings: Settings, n: int | None = None) -> tuple[Tensor, Tensor]:
    generator, n = torch.Generator().manual_seed(0), n or settings.batch_size
    x = torch.rand(n, *settings.shape(arch), generator=generator)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return x.to(settings.device), y.to(settings.device)


def passes(objective: str) -> float:
    """Passes that one step costs: those for gradients of weights beside those for inputs."""
    forward, backward = PASSES[objective](STEPS)
    return forward + backward + (backward - STEPS)


@functools.cache
def _macs(arch: str, settings: Settings) -> int:
    """Multiply-accumulates of one image, dense."""
    settings = dataclasses.replace(settings, device=torch.device("cpu"))
    model = build(arch, settings).eval()
    return measure_network(model, settings.shape(arch)).columns["dense_macs"]


def limit_of(arch: str, precision: str, passes: float, settings: Settings) -> float:
    """Images a second if all multiplications went at the best measured rate of this machine."""
    with computing(precision, settings.device):
        return multiply_rate(settings.device, precision) / (2 * _macs(arch, settings) * passes)


def laid_out(x_NCHW: Tensor, precision: str) -> Tensor:
    return x_NCHW.contiguous(memory_format=fast_memory_format(precision))


def attacker_of(precision: str, device: torch.device) -> objectives.Attacker:
    crafting = Crafting(steps=STEPS, step_size=STEP)
    generator = torch.Generator(device).manual_seed(0)
    return objectives.Attacker(EPS, crafting, generator, precision=precision)


def started(kind: Step, settings: Settings) -> tuple[Stage, Run]:
    """The first stage of a method, ready for its first step."""
    params = registry.entry("method", kind.method).params()
    stage = registry.load("method", kind.method).stages(params)[0]
    generator = torch.Generator(settings.device).manual_seed(0)
    run = Run(build(kind.arch, settings), kind.sparsity, generator, kind.arch, kind.precision)
    run.sparse_compute = kind.sparse_compute
    begin_stage(run, stage, steps=1000)
    run.lr = 0.1
    return stage, run


def our_step(kind: Step, settings: Settings) -> Side:
    stage, run = started(kind, settings)
    training = Training(crafting=Crafting(steps=STEPS, step_size=STEP))
    objective = objectives.make_objective(kind.objective, training)
    attacker = attacker_of(kind.precision, settings.device)
    x, y = images_of(kind.arch, settings)
    x = laid_out(x, kind.precision)

    def step() -> None:
        compute_gradients(run, stage, objective, attacker, (x, y))
        update(run, stage)

    return Side(step)


def their_step(kind: Step, settings: Settings) -> Side:
    textbook, model = load_textbook(), build(kind.arch, settings)
    if kind.layers is not None:
        textbook.sparsify(model, kind.layers, 1 - kind.sparsity)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=5e-4)
    once = textbook.at_step if kind.objective == "at" else textbook.trades_step
    x, y = images_of(kind.arch, settings)

    def step() -> None:
        once(model, optimizer, x, y, (EPS, STEP, STEPS))
        if kind.layers == "sampled":
            textbook.rewire(model, 1 - kind.sparsity, 0.1)

    return Side(step)


def our_rewiring(arch: str, sparsity: float, settings: Settings) -> Side:
    stage, run = started(Step(arch, "at", "fp32", "bcs", sparsity), settings)
    layers: list[Tensor] = [trained_weight(module) for module in prunable(run.model).values()]

    def prepare_step() -> None:
        stage.before_step(run)
        make_dormant(layers)

    return Side(lambda: stage.after_step(run), prepare_step)


def make_weights_dormant(model: nn.Module) -> None:
    """The same for a network of the textbook, whose weights are the values."""
    make_dormant([layer.weight for layer in prunable(model).values()])


def make_dormant(layers: list[Tensor]) -> None:
    """Push a share of the values above 0 below it, as a step of SGD does."""
    with torch.no_grad():
        for layer in layers:
            crossing = (layer > 0) & (torch.rand_like(layer) < DEATHS)
            layer.masked_fill_(crossing, -1e-3)


def step_of_many(arch: str, settings: Settings) -> Callable[[], None]:
    """The textbook's step for a network a thread, all at once."""
    textbook, images = load_textbook(), images_of(arch, settings)
    networks = [build(arch, settings) for _ in range(settings.threads)]
    stacked = torch.func.stack_module_state(networks)
    optimizer = torch.optim.SGD(stacked[0].values(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    given = (networks[0], stacked, optimizer, images, (EPS, STEP, STEPS))
    return functools.partial(textbook.at_step_of_many, *given)


@contextmanager
def processes(kind: Step, settings: Settings) -> Iterator[Side]:
    """Steps of one network a process, of one thread each. The processes start and stop outside of
    the time that is taken, as those of a study live for its whole training.
    """
    alone = dataclasses.replace(settings, threads=1)
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        # A pool a worker: no worker can take the work of another. One that dies raises.
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, context, begin_worker, (kind, alone)))
            for _ in range(settings.threads)
        ]

        def work() -> None:
            for done in [pool.submit(_go_on) for pool in pools]:
                done.result()

        yield Side(work)


_steps: list[Callable[[], None]] = []  # of this worker process


def begin_worker(kind: Step, settings: Settings) -> None:
    prepare(settings.threads)
    _steps.append(our_step(kind, settings).work)


def _go_on() -> None:
    repeat(_steps)


def repeat(steps: list[Callable[[], None]]) -> None:
    for _ in range(TOGETHER):
        for step in steps:
            step()
