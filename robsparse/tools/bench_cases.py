"""What is measured: one function a case, which compares our side with its rivals."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.datasets import Part
from robsparse.evaluation.attacks import AttackContext
from robsparse.fast import folding
from robsparse.schema.imagesets import Augmentation
from robsparse.tools import bench_sides as sides
from robsparse.tools.bench_inference import inference
from robsparse.tools.bench_sides import CLASSES, EPS, STEP, STEPS, Settings, Step
from robsparse.tools.stopwatch import Comparison, Side, copy_rate
from robsparse.training import augment
from robsparse.training.batches import Source, Stored

SURVIVE = 1e-6  # an eps that no image breaks at: every attack runs to its end
EPOCH = 2000  # images of the data case

NETWORKS = (
    {"method": "dense"},
    {"method": "static_random", "sparsity": 0.9, "layers": "masked"},
    {"method": "bcs", "sparsity": 0.9, "layers": "sampled"},
    {"method": "bcs", "sparsity": 0.99, "layers": "sampled"},
    {"method": "hydra", "sparsity": 0.9, "layers": "scored"},
)


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
        compare = functools.partial(settings.watch.compare, case, sides.our_step(kind, settings))
        count = settings.batch_size
        limit = sides.limit_of(kind.arch, kind.precision, sides.passes(kind.objective), settings)
        yield compare(sides.their_step(kind, settings), "textbook", count=count, limit=limit)
        if kind.method == "bcs":
            dense = sides.our_step(Step(kind.arch, kind.objective, kind.precision), settings)
            yield compare(dense, "our dense step", count=count)


def perturb(settings: Settings) -> Iterator[Comparison]:
    """Crafting with PGD-10 on a dense network."""
    textbook = sides.load_textbook()
    for arch, precision in itertools.product(settings.archs, settings.precisions):
        case = f"perturb {arch} {precision}"
        if not settings.wants(case):
            continue
        x, y = sides.images_of(arch, settings)
        model, attacker = (
            sides.build(arch, settings.device),
            sides.attacker_of(precision, settings.device),
        )
        yield settings.watch.compare(
            case,
            Side(functools.partial(attacker.attack_labels, model, sides.laid_out(x, precision), y)),
            Side(functools.partial(textbook.pgd, model, x, y, (EPS, STEP, STEPS))),
            "textbook",
            count=len(x),
            limit=sides.limit_of(arch, precision, 2 * STEPS, settings),
        )


def evaluate(settings: Settings) -> Iterator[Comparison]:
    """AutoAttack standard on images that all survive, against one call of the stock package."""
    module = registry.load("attack", "autoattack")
    gradients, forwards = module.passes(module.Params())
    for arch, sparsity in itertools.product(settings.archs, (0.0, 0.9, 0.99)):
        case = f"evaluate {arch} {sparsity:g}"
        if not settings.wants(case):
            continue
        x, _ = sides.images_of(arch, settings, settings.images)
        model = sides.build(arch, settings.device, sparsity).eval()
        with torch.no_grad():
            x, y = x.cpu(), model(x).argmax(1).cpu()
        threat = AttackContext("Linf", SURVIVE, 0, len(x), settings.device, report=lambda _: None)
        stock = AutoAttack(model, eps=SURVIVE, seed=0, device=settings.device)

        def ours(
            model: nn.Module = model, given: tuple[Tensor, Tensor] = (x, y), threat: Any = threat
        ) -> None:
            view = folding.folded_view(model, given[0].to(settings.device))
            module.run(view, *given, module.Params(), threat)

        yield dataclasses.replace(settings.watch, repeats=1).compare(
            case,
            Side(ours),
            Side(functools.partial(stock.run_standard_evaluation, x, y, batch_size=len(x))),
            "stock package",
            count=len(x),
            limit=sides.limit_of(arch, "fp32", 2 * gradients + forwards, settings),
            warm_up=False,
        )


def rewire(settings: Settings) -> Iterator[Comparison]:
    """Noise and rewiring of BCS after a step, without the step; and their share of a step."""
    textbook = sides.load_textbook()
    for arch, sparsity in itertools.product(settings.archs, (0.9, 0.99)):
        case = f"rewire {arch} {sparsity:g}"
        if not settings.wants(case):
            continue
        ours, density = sides.our_rewiring(arch, sparsity, settings), 1 - sparsity
        model = textbook.sparsify(sides.build(arch, settings.device), "sampled", density)
        theirs = Side(
            functools.partial(textbook.rewire, model, density, 0.1),
            functools.partial(sides.make_weights_dormant, model),
        )
        options: dict[str, Any] = {"count": 1, "unit": "steps/s"}
        yield settings.watch.compare(case, ours, theirs, "textbook", **options)
        for precision in settings.precisions:
            step = sides.our_step(Step(arch, "at", precision, "bcs", sparsity), settings)
            yield settings.watch.compare(
                f"{case} {precision}", ours, step, "whole step of PGD-10", **options
            )


def data(settings: Settings) -> Iterator[Comparison]:
    """An epoch of cropped and flipped 32x32 images."""
    textbook, size = sides.load_textbook(), settings.batch_size
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
        steps = [sides.our_step(kind, settings).work for _ in range(n)]
        count = n * sides.TOGETHER * settings.batch_size
        rivals = {
            "one process, in turn": functools.partial(sides.repeat, steps),
            "one process, vmap, fp32": functools.partial(
                sides.repeat, [sides.step_of_many(arch, settings)]
            ),
        }
        with sides.processes(kind, settings) as ours:
            for name, work in rivals.items():
                row = settings.watch.compare(case, ours, Side(work), name, count=count)
                # Other processes' memory is not in this one's account.
                yield dataclasses.replace(row, memory_mb=None, rival_memory_mb=None)


CASES: dict[str, Callable[[Settings], Iterator[Comparison]]] = {
    "train": train,
    "perturb": perturb,
    "evaluate": evaluate,
    "rewire": rewire,
    "data": data,
    "together": together,
    "inference": inference,
}
