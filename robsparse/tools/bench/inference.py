"""Benchmark of the use of a network: logits of an exported file, against dense networks."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from robsparse.api.loading import load
from robsparse.networks import compact
from robsparse.tools import export
from robsparse.tools.bench import sides
from robsparse.tools.bench.sides import CLASSES, Settings
from robsparse.tools.stopwatch import Comparison, Side

SPARSITIES = (0.9, 0.95, 0.99)
BATCHES = (1, 32, 256)  # images of one call; with 1, a second by the rate is the latency
IMAGES = 64  # of one time that is taken, at least

Run = Callable[[Tensor], Tensor]  # x_NCHW -> logits_NK


def inference(settings: Settings) -> Iterator[Comparison]:
    """Logits from a compact file by robsparse.load, against the dense network: in torch, and on a
    CPU in onnxruntime. All weights are fp32. Raises UsageError where onnxruntime is missing.
    """
    on_cpu = settings.device.type == "cpu"
    if on_cpu:
        export.require_onnx()
    for arch, sparsity in itertools.product(settings.archs, SPARSITIES):
        cases = {n: f"inference {arch} {sparsity:g} batch {n}" for n in BATCHES}
        if not any(map(settings.wants, cases.values())):
            continue
        dense = sides.build(arch, settings).eval()
        rivals: dict[str, Run] = {"dense, torch": dense}
        if on_cpu:
            rivals["dense, onnxruntime"] = _in_onnxruntime(dense, arch, settings)
        ours = _from_file(arch, sparsity, settings)
        for n, case in cases.items():
            if settings.wants(case):
                yield from _compare(
                    case, ours, rivals, sides.images_of(arch, settings, n)[0], settings
                )


def _compare(
    case: str, ours: Run, rivals: dict[str, Run], x_NCHW: Tensor, settings: Settings
) -> Iterator[Comparison]:
    calls = -(-IMAGES // len(x_NCHW))
    for name, rival in rivals.items():
        one, other = (Side(_calls(run, x_NCHW, calls)) for run in (ours, rival))
        yield settings.watch.compare(case, one, other, name, count=calls * len(x_NCHW))


def _calls(run: Run, x_NCHW: Tensor, calls: int) -> Callable[[], None]:
    def work() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                run(x_NCHW)

    return work


def _from_file(arch: str, sparsity: float, settings: Settings) -> nn.Module:
    """Return a network with random sparse weights as a user loads it from a compact file."""
    network = sides.build(arch, dataclasses.replace(settings, device=torch.device("cpu")), sparsity)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        compact.write(
            path,
            network.state_dict(),
            arch=arch,
            arch_params=sides.params_of(arch, settings).model_dump(mode="json"),
            dataset="random",
            image_shape=settings.shape(arch),
            classes=CLASSES,
            provenance={},
        )
        return load(path).to(settings.device)


def _in_onnxruntime(network: nn.Module, arch: str, settings: Settings) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export.write_onnx(network, sides.images_of(arch, settings, 2)[0], path)
        return export.onnx_session(path, settings.threads)
