"""Measures this suite against a textbook loop and the stock package, and against the machine.

Every pair runs in one process, in turn, after a warm-up; medians are compared. The limit is what
the largest matrix product of this machine reaches at the same precision, or its copying of memory:
no code with dense kernels does more images a second than that many operations allow.
"""

import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import check_writable, write_json
from robsparse.compute.machine import (
    computing,
    device_name,
    fast_memory_format,
    pick_device,
    pick_precision,
    prepare,
)
from robsparse.datasets import Part
from robsparse.evaluation.attacks import AttackContext
from robsparse.evaluation.measure import measure_network
from robsparse.fast import folding
from robsparse.schema.imagesets import Augmentation
from robsparse.schema.threat import Crafting
from robsparse.schema.training import Training
from robsparse.sparsity.budgets import erk_keep_counts
from robsparse.sparsity.layers import prunable, trained_weight
from robsparse.sparsity.masks import random_masks
from robsparse.study.cost import PASSES
from robsparse.tools.stopwatch import Comparison, Side, Stopwatch, copy_rate, multiply_rate
from robsparse.training import augment, objectives
from robsparse.training.batches import Source, Stored
from robsparse.training.loop import compute_gradients, update
from robsparse.training.stages import Run, Stage, begin_stage

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
CLASSES = 10
SMALL = ("small_cnn", "small_resnet")  # which see the digits, at the width of the quick study
SURVIVE = 1e-6  # an eps that no image breaks at: every attack runs to its end
DEATHS = 0.001  # of the live connections, in a step that is rewired
EPOCH = 2000  # images of the data case
TOGETHER = 20  # steps of each network that are timed together


@dataclass(frozen=True)
class Step:
    """A kind of training step of ours; `layers` is what the textbook has for the method."""

    arch: str
    objective: str
    precision: str
    method: str = "dense"
    sparsity: float = 0.0
    layers: str | None = None

    def __str__(self) -> str:
        names = (self.arch, self.objective, self.method, f"{self.sparsity:g}", self.precision)
        return " ".join(names)


NETWORKS = (
    {"method": "dense"},
    {"method": "static_random", "sparsity": 0.9, "layers": "masked"},
    {"method": "bcs", "sparsity": 0.9, "layers": "sampled"},
    {"method": "bcs", "sparsity": 0.99, "layers": "sampled"},
    {"method": "hydra", "sparsity": 0.9, "layers": "scored"},
)


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often; `only` is a part of the names of the cases that are run."""

    archs: tuple[str, ...]
    precisions: tuple[str, ...]
    batch_size: int
    images: int
    repeats: int
    threads: int
    only: str
    device: torch.device

    @property
    def watch(self) -> Stopwatch:
        """What times a pair."""
        return Stopwatch(self.device, self.repeats)

    def wants(self, case: str) -> bool:
        """Whether a case of this name is to be run."""
        return self.only in case


def settings_of(
    archs: list[str], precisions: list[str], *, device: str, threads: int, **counts: Any
) -> Settings:
    """Checked settings. Raises UsageError for an arch that is not registered."""
    for name in archs:
        registry.entry("arch", name)
    prepare(threads)
    where = pick_device(device)
    picked = tuple(dict.fromkeys(pick_precision(wanted, where) for wanted in precisions))
    return Settings(tuple(archs), picked, device=where, threads=threads, **counts)


def run(case: str, settings: Settings, file: Path | None) -> str:
    """Measure one case; returns a Markdown table. `file` gets the rows as JSON.

    Raises UsageError when `file` cannot be written or no case has the wanted name.
    """
    if file is not None:
        if file.is_dir():
            raise UsageError(f"{file}: a folder, expected the name of a file")
        check_writable(file.parent)
    device = device_name(settings.device)
    times = "once each" if case == "evaluate" else f"medians of {settings.repeats}"
    print(f"{case} on {device}, {times}", flush=True)
    rows = []
    for row in CASES[case](settings):
        print(_line(row), flush=True)
        rows.append(row)
    if not rows:
        raise UsageError(f"--only {settings.only}: no case of '{case}' has that in its name")
    if file is not None:
        plain = [dataclasses.asdict(row) for row in rows]
        write_json(file, {"device": device, "rows": plain})
    return "\n".join(["", *_table(rows), *([f"rows: {file}"] if file else [])])


def _line(row: Comparison) -> str:
    return f"{row.case}: {row.ours:.4g} {row.unit}, {row.rival_name} {row.rival:.4g}"


def _table(rows: list[Comparison]) -> list[str]:
    lines = [
        "| case | ours | rival | ratio | share of the limit | memory, ours and rival |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "n/a" if row.limit_share is None else f"{row.limit_share:.0%}"
        memory = [row.memory_mb, row.rival_memory_mb]
        sizes = "n/a" if None in memory else ", ".join(f"{value:.0f} MB" for value in memory)
        lines.append(
            f"| {row.case} | {row.ours:.4g} {row.unit} | {row.rival_name}: {row.rival:.4g} "
            f"| {row.ratio:.2f} | {share} | {sizes} |"
        )
    return lines


# ---------------------------------------------------------------- cases


def train(settings: Settings) -> Iterator[Comparison]:
    """Training steps of PGD-10 `at` and of TRADES: dense, masked, BCS, HYDRA's pruning. BCS is
    compared with our own dense step too.
    """
    kinds = [
        Step(arch, objective, precision, **network)
        for arch, objective, precision in itertools.product(
            settings.archs, ("at", "trades"), settings.precisions
        )
        for network in NETWORKS
    ]
    for kind in kinds:
        case = f"train {kind}"
        if not settings.wants(case):
            continue
        compare = functools.partial(settings.watch.compare, case, _our_step(kind, settings))
        count = settings.batch_size
        limit = _limit(kind.arch, kind.precision, _passes(kind.objective), settings)
        yield compare(_their_step(kind, settings), "textbook", count=count, limit=limit)
        if kind.method == "bcs":
            dense = _our_step(Step(kind.arch, kind.objective, kind.precision), settings)
            yield compare(dense, "our dense step", count=count)


def perturb(settings: Settings) -> Iterator[Comparison]:
    """Crafting with PGD-10 on a dense network."""
    textbook = _textbook()
    for arch, precision in itertools.product(settings.archs, settings.precisions):
        case = f"perturb {arch} {precision}"
        if not settings.wants(case):
            continue
        x, y = _images(arch, settings)
        model, attacker = _build(arch, settings.device), _attacker(precision, settings.device)
        yield settings.watch.compare(
            case,
            Side(functools.partial(attacker.attack_labels, model, _laid_out(x, precision), y)),
            Side(functools.partial(textbook.pgd, model, x, y, (EPS, STEP, STEPS))),
            "textbook",
            count=len(x),
            limit=_limit(arch, precision, 2 * STEPS, settings),
        )


def evaluate(settings: Settings) -> Iterator[Comparison]:
    """AutoAttack standard on images that all survive, against one call of the stock package."""
    module = registry.load("attack", "autoattack")
    gradients, forwards = module.passes(module.Params())
    for arch, sparsity in itertools.product(settings.archs, (0.0, 0.9, 0.99)):
        case = f"evaluate {arch} {sparsity:g}"
        if not settings.wants(case):
            continue
        x, _ = _images(arch, settings, settings.images)
        model = _build(arch, settings.device, sparsity).eval()
        with torch.no_grad():
            x, y = x.cpu(), model(x).argmax(1).cpu()
        threat = AttackContext("Linf", SURVIVE, 0, len(x), settings.device, report=lambda _: None)
        stock = AutoAttack(model, eps=SURVIVE, seed=0, device=settings.device)

        def ours(
            model: nn.Module = model, given: tuple[Tensor, Tensor] = (x, y), threat: Any = threat
        ) -> None:
            view = folding.view_of(model, given[0].to(settings.device))
            module.run(view, *given, module.Params(), threat)

        yield dataclasses.replace(settings.watch, repeats=1).compare(
            case,
            Side(ours),
            Side(functools.partial(stock.run_standard_evaluation, x, y, batch_size=len(x))),
            "stock package",
            count=len(x),
            limit=_limit(arch, "fp32", 2 * gradients + forwards, settings),
            warm_up=False,
        )


def rewire(settings: Settings) -> Iterator[Comparison]:
    """Noise, deaths and regrowths of BCS after a step, without the step; and their share of one."""
    textbook = _textbook()
    for arch, sparsity in itertools.product(settings.archs, (0.9, 0.99)):
        case = f"rewire {arch} {sparsity:g}"
        if not settings.wants(case):
            continue
        ours, density = _our_rewiring(arch, sparsity, settings), 1 - sparsity
        model = textbook.sparsify(_build(arch, settings.device), "sampled", density)
        theirs = Side(
            functools.partial(textbook.rewire, model, density, 0.1),
            functools.partial(_kill_weights, model),
        )
        options: dict[str, Any] = {"count": 1, "unit": "steps/s"}
        yield settings.watch.compare(case, ours, theirs, "textbook", **options)
        for precision in settings.precisions:
            step = _our_step(Step(arch, "at", precision, "bcs", sparsity), settings)
            yield settings.watch.compare(
                f"{case} {precision}", ours, step, "whole step of PGD-10", **options
            )


def data(settings: Settings) -> Iterator[Comparison]:
    """An epoch of cropped and flipped 32x32 images."""
    textbook, size = _textbook(), settings.batch_size
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (EPOCH, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, EPOCH)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    stored = Stored.from_part(Part(x, torch.from_numpy(labels)), settings.device)
    augmentation = Augmentation(kind="crop", flip=True)

    def ours() -> None:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(EPOCH, generator=generator).to(settings.device)
        draws = augment.draw(EPOCH, augmentation, generator).to(settings.device)
        source = Source(stored, order, draws, augmentation, size, settings.device)
        for step in range(EPOCH // size):
            source.batch(step)

    def theirs() -> None:
        for images_NCHW, _ in textbook.batches(images, labels, size, 0):
            images_NCHW.to(settings.device)

    # A byte is read and a number written for each value.
    limit = copy_rate(settings.device) / (5 * x[0].numel())
    if settings.wants("data 32x32"):
        yield settings.watch.compare(
            "data 32x32", Side(ours), Side(theirs), "textbook", count=EPOCH, limit=limit
        )


def together(settings: Settings) -> Iterator[Comparison]:
    """Dense steps of PGD-10 `at` for one network a thread: a process of one thread each, against
    one process with all threads that takes them in turn, or all at once by vmap. Raises UsageError
    for one thread: there is nothing to share out.
    """
    n = settings.threads
    if n < 2:
        raise UsageError(f"--threads {n}: 'together' trains a network a thread, expected 2 or more")
    for arch, precision in itertools.product(settings.archs, settings.precisions):
        case = f"together {arch} x{n} {precision}"
        if not settings.wants(case):
            continue
        kind = Step(arch, "at", precision)
        steps = [_our_step(kind, settings).work for _ in range(n)]
        count = n * TOGETHER * settings.batch_size
        rivals = {
            "one process, in turn": functools.partial(_repeat, steps),
            "one process, vmap, fp32": functools.partial(_repeat, [_step_of_many(arch, settings)]),
        }
        with _processes(kind, settings) as ours:
            for name, work in rivals.items():
                row = settings.watch.compare(case, ours, Side(work), name, count=count)
                # Other processes' memory is not in this one's account.
                yield dataclasses.replace(row, memory_mb=None, rival_memory_mb=None)


def _repeat(steps: list[Callable[[], None]]) -> None:
    for _ in range(TOGETHER):
        for step in steps:
            step()


CASES: dict[str, Callable[[Settings], Iterator[Comparison]]] = {
    "train": train,
    "perturb": perturb,
    "evaluate": evaluate,
    "rewire": rewire,
    "data": data,
    "together": together,
}


# ---------------------------------------------------------------- the two sides


@functools.cache
def _textbook() -> ModuleType:
    """benchmarks/textbook.py of the checkout. Raises UsageError where there is none."""
    path = Path(__file__).parents[2] / "benchmarks" / "textbook.py"
    if not path.exists():
        raise UsageError(f"{path}: not there; bench runs in a checkout of the repository")
    spec = importlib.util.spec_from_file_location("textbook", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(arch: str, device: torch.device, sparsity: float = 0.0) -> nn.Module:
    """A network with random weights, of which a share is 0: shares of layers by ERK."""
    torch.manual_seed(0)
    options = {"width": 24} if arch in SMALL else {}
    params = registry.entry("arch", arch).params(**options)
    model = models.build(arch, params, _shape(arch), CLASSES)
    if sparsity:
        masks = random_masks(model, erk_keep_counts(model, sparsity), torch.Generator())
        for name, module in prunable(model).items():
            module.weight.data.mul_(masks[name])
    return model.to(device)


def _shape(arch: str) -> tuple[int, int, int]:
    return (1, 8, 8) if arch in SMALL else (3, 32, 32)


def _images(arch: str, settings: Settings, n: int | None = None) -> tuple[Tensor, Tensor]:
    generator, n = torch.Generator().manual_seed(0), n or settings.batch_size
    x = torch.rand(n, *_shape(arch), generator=generator)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return x.to(settings.device), y.to(settings.device)


def _passes(objective: str) -> float:
    """Passes that one step costs: those for gradients of weights beside those for inputs."""
    forward, backward = PASSES[objective](STEPS)
    return forward + backward + (backward - STEPS)


@functools.cache
def _macs(arch: str) -> int:
    """Multiply-accumulates of one image, dense."""
    model = _build(arch, torch.device("cpu")).eval()
    return measure_network(model, _shape(arch)).columns["dense_macs"]


def _limit(arch: str, precision: str, passes: float, settings: Settings) -> float:
    """Images a second if all multiplications went at the rate of a large matrix product."""
    with computing(precision, settings.device):
        return multiply_rate(settings.device, precision) / (2 * _macs(arch) * passes)


def _laid_out(x_NCHW: Tensor, precision: str) -> Tensor:
    return x_NCHW.contiguous(memory_format=fast_memory_format(precision))


def _attacker(precision: str, device: torch.device) -> objectives.Attacker:
    crafting = Crafting(steps=STEPS, step_size=STEP)
    generator = torch.Generator(device).manual_seed(0)
    return objectives.Attacker(EPS, crafting, generator, precision=precision)


def _started(kind: Step, device: torch.device) -> tuple[Stage, Run]:
    """The first stage of a method, ready for its first step."""
    params = registry.entry("method", kind.method).params()
    stage = registry.load("method", kind.method).stages(params)[0]
    generator = torch.Generator(device).manual_seed(0)
    run = Run(_build(kind.arch, device), kind.sparsity, generator, kind.arch, kind.precision)
    begin_stage(run, stage, steps=1000)
    run.lr = 0.1
    return stage, run


def _our_step(kind: Step, settings: Settings) -> Side:
    stage, run = _started(kind, settings.device)
    training = Training(crafting=Crafting(steps=STEPS, step_size=STEP))
    objective = objectives.make_objective(kind.objective, training)
    attacker = _attacker(kind.precision, settings.device)
    x, y = _images(kind.arch, settings)
    x = _laid_out(x, kind.precision)

    def step() -> None:
        compute_gradients(run, stage, objective, attacker, (x, y))
        update(run, stage)

    return Side(step)


def _their_step(kind: Step, settings: Settings) -> Side:
    textbook, model = _textbook(), _build(kind.arch, settings.device)
    if kind.layers is not None:
        textbook.sparsify(model, kind.layers, 1 - kind.sparsity)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=5e-4)
    once = textbook.at_step if kind.objective == "at" else textbook.trades_step
    x, y = _images(kind.arch, settings)

    def step() -> None:
        once(model, optimizer, x, y, (EPS, STEP, STEPS))
        if kind.layers == "sampled":
            textbook.rewire(model, 1 - kind.sparsity, 0.1)

    return Side(step)


def _our_rewiring(arch: str, sparsity: float, settings: Settings) -> Side:
    stage, run = _started(Step(arch, "at", "fp32", "bcs", sparsity), settings.device)
    layers: list[Tensor] = [trained_weight(module) for module in prunable(run.model).values()]

    def kill() -> None:
        stage.before_step(run)
        _kill(layers)

    return Side(lambda: stage.after_step(run), kill)


def _kill_weights(model: nn.Module) -> None:
    _kill([layer.weight for layer in prunable(model).values()])


def _kill(layers: list[Tensor]) -> None:
    """Push a share of the live values below 0, as a step of SGD does."""
    with torch.no_grad():
        for layer in layers:
            dying = (layer > 0) & (torch.rand_like(layer) < DEATHS)
            layer.masked_fill_(dying, -1e-3)


def _step_of_many(arch: str, settings: Settings) -> Callable[[], None]:
    """The textbook's step for a network a thread, all at once."""
    textbook, images = _textbook(), _images(arch, settings)
    networks = [_build(arch, settings.device) for _ in range(settings.threads)]
    stacked = torch.func.stack_module_state(networks)
    optimizer = torch.optim.SGD(stacked[0].values(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    given = (networks[0], stacked, optimizer, images, (EPS, STEP, STEPS))
    return functools.partial(textbook.at_step_of_many, *given)


@contextmanager
def _processes(kind: Step, settings: Settings) -> Iterator[Side]:
    """Steps of one network a process, of one thread each. The processes start and stop outside of
    the time that is taken, as those of a study live for its whole training.
    """
    alone = dataclasses.replace(settings, threads=1)
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        # A pool a worker: no worker can take the work of another. One that dies raises.
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, context, _begin, (kind, alone)))
            for _ in range(settings.threads)
        ]

        def work() -> None:
            for done in [pool.submit(_go_on) for pool in pools]:
                done.result()

        yield Side(work)


_steps: list[Callable[[], None]] = []  # of this worker process


def _begin(kind: Step, settings: Settings) -> None:
    prepare(settings.threads)
    _steps.append(_our_step(kind, settings).work)


def _go_on() -> None:
    _repeat(_steps)
