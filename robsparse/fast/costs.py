"""The measured cost of each form of a convolution on this machine, and the choice of forms.

The cost of a form is the processor time of one output and one input gradient, for random maps. It
depends on the processor, on the number of threads, on the precision and on the number of images. A
cost is measured when it is needed for the first time. It is kept in a file of this machine
(`ROBSPARSE_CACHE`, or `robsparse` in the user's cache folder), so that all later runs on this
machine choose the same forms and give the same bits. Without a writable folder, the costs hold
for one process.

With `ROBSPARSE_COSTS=estimated` in the environment, and always in double precision, a formula
replaces the measurement. It gives the same forms on every machine. The tests use it.
"""

import functools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import torch
from filelock import FileLock
from pydantic import Field, NonNegativeFloat, TypeAdapter, ValidationError
from torch import nn

from robsparse.base.errors import RunError, UsageError
from robsparse.base.files import read_record, write_record
from robsparse.fast.forms import LARGEST_MATRIX, Form, Kind, MatrixForm, PlainForm, SparseForm
from robsparse.kernels.geometry import Geometry
from robsparse.kernels.library import library
from robsparse.kernels.maps import images_innermost
from robsparse.kernels.patterns import Pattern, SparseConvolution

# Numbers of images for which costs are measured. A batch uses the largest one that it reaches.
IMAGES = (1, 16, 64)
# Densities for which the sparse kernels are measured. Their cost is linear in between and outside.
DENSITIES = (0.02, 0.2)
# A measurement repeats a form for at least this time (seconds), and takes the fastest repetition.
SHORTEST, REPETITIONS = 0.002, 3

_SPARSE = (torch.float32, torch.float64)  # the types that the kernels compute with

Costs = dict[str, Any]


def images_class(images: int) -> int:
    """Return the number of images in IMAGES that stands for a batch of this size."""
    return max((size for size in IMAGES if size <= images), default=IMAGES[0])


def costs_of(
    layer: nn.Conv2d, geometry: Geometry, dtypes: tuple[torch.dtype, torch.dtype], images: int
) -> Costs:
    """Return the costs of the forms of a convolution in seconds.

    Args:
        layer, geometry: the convolution.
        dtypes: precision of the plain forms and of the matrix, and precision of the network.
        images: one of IMAGES.

    Returns:
        "channels_last", "channels_first": cost of a plain form whose maps have its format.
        "converted": the smaller cost of the two if its maps have images innermost.
        "matrix": with images innermost. Only for small maps.
        "sparse": cost without weights, and cost per density. Only with the kernels.
    """
    if dtypes[1] == torch.float64 or os.environ.get("ROBSPARSE_COSTS") == "estimated":
        return estimate(layer, geometry, dtypes, images)
    options = layer.groups, _name(dtypes[0]), _name(dtypes[1]), images
    key = "; ".join(map(str, (*astuple(geometry), *options)))
    return _table().get(key, lambda: _measure(layer, geometry, dtypes, images))


def choose(costs: Sequence[Costs], densities: Sequence[float]) -> list[Kind]:
    """Return the forms with the smallest total cost for the convolutions of a network.

    Either all forms are plain, or the maps have images innermost. Then a plain form pays for the
    conversion of its maps.
    """
    plain = [_fastest_plain(cost) for cost in costs]
    mixed = [_fastest_mixed(*given) for given in zip(costs, densities, strict=True)]
    totals = [sum(cost for _, cost in choice) for choice in (plain, mixed)]
    return [kind for kind, _ in (mixed if totals[1] < totals[0] else plain)]


def _fastest_plain(cost: Costs) -> tuple[Kind, float]:
    kinds: tuple[Kind, ...] = ("channels_last", "channels_first")
    return min(((kind, cost[kind]) for kind in kinds), key=lambda pair: pair[1])


def _fastest_mixed(cost: Costs, density: float) -> tuple[Kind, float]:
    found: list[tuple[Kind, float]] = [(_fastest_plain(cost)[0], cost["converted"])]
    if "matrix" in cost:
        found.append(("matrix", cost["matrix"]))
    if "sparse" in cost:
        fixed, slope = cost["sparse"]
        found.append(("sparse", fixed + slope * density))
    return min(found, key=lambda pair: pair[1])


def training_costs_of(
    geometry: Geometry, dtypes: tuple[torch.dtype, torch.dtype], images: int
) -> Costs:
    """Return the costs of the training pass of a convolution in seconds.

    A pass computes the output, the gradient of the input and the gradient of the weight. The
    sparse kernels compute the gradient at active weights only.

    Args:
        geometry: the convolution. It has no groups, and the same padding at both sides.
        dtypes: precision of the dense pass, and precision of the network.
        images: one of IMAGES.

    Returns:
        "dense": cost of the convolution of torch.
        "sparse": cost without weights, and cost per density.
    """
    if dtypes[1] == torch.float64 or os.environ.get("ROBSPARSE_COSTS") == "estimated":
        weights, pixels = math.prod(geometry.weight), math.prod(geometry.out)
        elements = images * (geometry.weight[1] * math.prod(geometry.size))
        elements += images * geometry.weight[0] * pixels
        flops, memory = 6.0 * images * weights * pixels, 3 * 4 * elements / 1e10
        return {"dense": flops / 1e11 + memory + 1e-4, "sparse": [memory, flops / 3e10]}
    options = *map(_name, dtypes), images
    key = "; ".join(map(str, ("training", *astuple(geometry), *options)))
    return _table().get(key, lambda: _measure_training(geometry, dtypes, images))


def pays(costs: Sequence[Costs], densities: Sequence[float]) -> bool:
    """Return whether the sparse training pass of some convolutions costs less than the dense one.

    costs: of `training_costs_of`, one for each convolution.
    """
    sparse = sum(
        cost["sparse"][0] + cost["sparse"][1] * density
        for cost, density in zip(costs, densities, strict=True)
    )
    return bool(sparse < sum(cost["dense"] for cost in costs))


def estimate(
    layer: nn.Conv2d, geometry: Geometry, dtypes: tuple[torch.dtype, torch.dtype], images: int
) -> Costs:
    """Return costs like `costs_of`, from a formula: operations and bytes at fixed rates.

    Rates: 100 Gflop/s for plain forms and matrices, 30 Gflop/s for the sparse kernels, 10 GB/s for
    maps, 2 GB/s for their conversion, and 0.1 ms for the calls of a plain form.
    """
    weights = geometry.weight[0] * geometry.weight[1] * geometry.weight[2] * geometry.weight[3]
    pixels, read = (side[0] * side[1] for side in (geometry.out, geometry.size))
    elements = images * (layer.in_channels * read + layer.out_channels * pixels)
    flops, memory = 4.0 * images * weights * pixels, 2 * 4 * elements / 1e10
    plain = flops / 1e11 + memory + 1e-4
    costs: Costs = {"channels_last": plain, "channels_first": 1.01 * plain}
    costs["converted"] = plain + 5 * memory
    entries = layer.in_channels * read * layer.out_channels * pixels
    if layer.groups == 1 and entries <= LARGEST_MATRIX:
        costs["matrix"] = 4 * images * entries / 1e11 + memory
    if layer.groups == 1 and library() is not None and dtypes[1] in _SPARSE:
        costs["sparse"] = [memory, flops / 3e10]
    return costs


# ---------------------------------------------------------------- measuring


def _measure(
    layer: nn.Conv2d, geometry: Geometry, dtypes: tuple[torch.dtype, torch.dtype], images: int
) -> Costs:
    used, full = dtypes
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(geometry.weight, generator=draw, dtype=full)
    x = torch.rand(images, layer.in_channels, *geometry.size, generator=draw, dtype=full)
    upstream = torch.rand(images, layer.out_channels, *geometry.out, generator=draw, dtype=full)
    costs: Costs = {}
    kinds: tuple[Kind, ...] = ("channels_last", "channels_first")
    plain = {kind: PlainForm(layer, geometry, weight.to(used), None, kind) for kind in kinds}
    for kind, form in plain.items():
        maps = (tensor.to(used).contiguous(memory_format=form.format) for tensor in (x, upstream))
        costs[kind] = _seconds(form, *maps)
    innermost = images_innermost(x), images_innermost(upstream)
    fastest = plain[_fastest_plain(costs)[0]]
    costs["converted"] = _seconds(fastest, *innermost, converted=True)
    if layer.groups != 1:
        return costs
    if x[0].numel() * upstream[0].numel() <= LARGEST_MATRIX:
        costs["matrix"] = _seconds(MatrixForm(geometry, weight.to(used), None), *innermost)
    if library() is not None and full in _SPARSE:
        times = []
        for density in DENSITIES:
            mask = torch.rand(weight.shape, generator=draw) < density
            pattern = Pattern(geometry, mask.flatten().nonzero().squeeze(1), full)
            times.append(_seconds(SparseForm(pattern, weight, None), *innermost))
        slope = max(0.0, (times[1] - times[0]) / (DENSITIES[1] - DENSITIES[0]))
        costs["sparse"] = [max(0.0, times[0] - slope * DENSITIES[0]), slope]
    return costs


@torch.no_grad()
def _measure_training(
    geometry: Geometry, dtypes: tuple[torch.dtype, torch.dtype], images: int
) -> Costs:
    used, full = dtypes
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(geometry.weight, generator=draw, dtype=full)
    x = torch.rand(images, geometry.weight[1], *geometry.size, generator=draw, dtype=full)
    upstream = torch.rand(images, geometry.weight[0], *geometry.out, generator=draw, dtype=full)
    options = list(geometry.stride), list(geometry.padding), list(geometry.dilation)
    format = torch.contiguous_format if used == full else torch.channels_last
    dense = [t.to(used).contiguous(memory_format=format) for t in (x, upstream, weight)]

    def run_dense() -> None:
        torch.conv2d(dense[0], dense[2], None, *options)
        torch.ops.aten.convolution_backward(
            dense[1], dense[0], dense[2], None, *options, False, [0, 0], 1, [True, True, False]
        )

    innermost = images_innermost(x), images_innermost(upstream)
    times = []
    for density in DENSITIES:
        mask = torch.rand(weight.shape, generator=draw) < density
        pattern = Pattern(geometry, mask.flatten().nonzero().squeeze(1), full)
        times.append(_fastest(functools.partial(_run_sparse, pattern, weight, *innermost)))
    slope = max(0.0, (times[1] - times[0]) / (DENSITIES[1] - DENSITIES[0]))
    return {
        "dense": _fastest(run_dense),
        "sparse": [max(0.0, times[0] - slope * DENSITIES[0]), slope],
    }


def _run_sparse(
    pattern: Pattern, weight: torch.Tensor, x: torch.Tensor, upstream: torch.Tensor
) -> None:
    convolution = SparseConvolution(pattern, weight.view(-1)[pattern.positions])
    convolution.output(x)
    convolution.input_gradient(upstream)
    convolution.weight_gradient(x, upstream)


@torch.no_grad()
def _seconds(
    form: Form, x: torch.Tensor, upstream: torch.Tensor, *, converted: bool = False
) -> float:
    """Return the processor time of one output and one input gradient.

    converted: the results are converted to images innermost too.
    """

    def run() -> None:
        results = form.output(x, None, rectified=False), form.input_gradient(upstream, None, None)
        if converted:
            for result in results:
                images_innermost(result)

    return _fastest(run)


def _fastest(run: Callable[[], object]) -> float:
    """Return the processor time of a call: the smallest one of several repetitions."""
    clock: Callable[[], float] = (
        time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    )
    fastest = float("inf")
    with torch.autocast("cpu", enabled=False):
        run()
        for _ in range(REPETITIONS):
            start, count = clock(), 0
            while clock() - start < SHORTEST or count == 0:
                run()
                count += 1
            fastest = min(fastest, (clock() - start) / count)
    return fastest


# ---------------------------------------------------------------- the file of the machine


_Pair = Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=2)]
_FILE: TypeAdapter[dict[str, Costs]] = TypeAdapter(dict[str, dict[str, NonNegativeFloat | _Pair]])
_AGAIN = "the costs are measured again"


class _Table:
    """The costs of this machine, in memory and in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.costs: dict[str, Costs] = {}

    def get(self, key: str, measure: Callable[[], Costs]) -> Costs:
        """Return the costs of a key. Only one process measures them."""
        if key not in self.costs:
            try:
                self._measure_once(key, measure)
            except (OSError, UsageError, RunError) as error:
                print(f"{error}; the measured costs are not stored", file=sys.stderr)
                self.path = None
                self._measure_once(key, measure)
        return self.costs[key]

    def _measure_once(self, key: str, measure: Callable[[], Costs]) -> None:
        """Measure the costs of a key, unless another process has done so."""
        with FileLock(self.path.with_suffix(".lock")) if self.path else nullcontext():
            self.costs |= self._read()
            if key not in self.costs:
                self.costs[key] = measure()
                if self.path:
                    write_record(self.path, self.costs)

    def _read(self) -> dict[str, Costs]:
        """Return the costs in the file. If it is damaged, a line says so, and there are none."""
        if not (self.path and self.path.exists()):
            return {}
        try:
            return read_record(self.path, _FILE.validate_python, _AGAIN)
        except UsageError as error:
            print(error, file=sys.stderr)
        except ValidationError:
            print(f"{self.path}: damaged, expected costs in seconds; {_AGAIN}", file=sys.stderr)
        return {}


def _table() -> _Table:
    return _table_for(torch.get_num_threads(), os.environ.get("ROBSPARSE_CACHE"))


@functools.cache
def _table_for(threads: int, folder: str | None) -> _Table:
    """Return the table of this processor, with this number of threads."""
    kernels = library()
    names = (
        processor(), torch.__version__, kernels.instructions() if kernels else "no kernels",
        f"{threads} threads",
    )  # fmt: skip
    name = "".join(c if c.isalnum() else "-" for c in " ".join(names))
    try:
        path = _cache_folder(folder)
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return _Table(path / f"costs {name}.json".replace(" ", "-"))
    except OSError:
        pass
    return _Table(None)


def _cache_folder(folder: str | None) -> Path:
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robsparse"


@functools.cache
def processor() -> str:
    """Return the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
