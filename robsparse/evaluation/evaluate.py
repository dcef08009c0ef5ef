"""The one evaluator: it sees a plain torch model and test images, never a method."""

import functools
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robsparse import datasets
from robsparse.base import registry
from robsparse.base.errors import RunError, UsageError, in_a_line
from robsparse.base.files import atomic, check_writable, file_checksum, read_json
from robsparse.compute.machine import device_name, pick_device, prepare
from robsparse.datasets import Part
from robsparse.evaluation import sanity_checks
from robsparse.evaluation.attacks import AttackContext, Cache, Outcome, identity, no_surrogate
from robsparse.fast import folding, proof
from robsparse.networks import construct, external, weights
from robsparse.records import provenance
from robsparse.records.evaluation_record import Record, read_record, write_record
from robsparse.records.rows import KEY, Row, wilson_interval
from robsparse.schema import AttackParams, Evaluation, Selection, Threat
from robsparse.sparsity.masks import prunable
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout, derive_seed
from robsparse.study.study import Study
from robsparse.study.targets import Target


class EvaluationError(RunError):
    """An attack cannot go on, e.g. because the network fails on an image."""


@contextmanager
def _failing(attack: str) -> Iterator[None]:
    """Turn what an attack or the attacked network raises into one line that says where."""
    try:
        yield
    except (UsageError, OSError):
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise EvaluationError(
            f"{attack}: {in_a_line(error)} ({frame.filename}, line {frame.lineno}); what was "
            "finished before is kept for the next call"
        ) from error


def evaluate_cell(
    study: Study,
    cell: Cell,
    selection: Selection,
    layout: Layout,
    *,
    target: Target | None = None,
    fresh: bool = False,
    device: str | None = None,
    threads: int | None = None,
) -> Path:
    """Attack one set of weights and write its record and per-image outcomes.

    target: which weights, and where to write; None for the cell's own in the study's folder.
    fresh: whether parts that a killed evaluation has kept are thrown away instead of taken over.

    Returns the path of the record. Raises UsageError, and writes nothing, when the weights are
    missing or damaged, the images are not what an attack expects or the network does not map them
    to logits; EvaluationError when it fails later. Finished parts are kept then.
    """
    fingerprint = fingerprints.evaluation(study, cell, selection)
    prepare(threads or study.machine.threads)
    where = pick_device(device or study.machine.device)
    own = target is None
    target = target or Target.of_study(layout, cell, selection)
    check_writable(target.record.parent)
    parts = layout.cache(cell, selection)
    if fresh:
        shutil.rmtree(parts, ignore_errors=True)
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    if own:
        model, origin = external.opened(study, cell, splits, layout, selection)
    else:
        model = construct.with_weights(study, cell, splits, target.weights, target.match)
        origin = str(study.source(cell.method))
    examples = first_examples(splits.test, study.evaluation.n_examples, splits.classes)
    model = model.to(where).eval()
    construct.checked(model, examples.x_NCHW[:2].to(where), splits.classes)
    with _failing("counting weights"):
        measured = measure(model, splits.image_shape)
    results = attack_model(
        model,
        examples,
        study.attacks_of(selection),
        settings=study.evaluation,
        threat=study.threat,
        device=where,
        cache=parts,
        surrogate=surrogates(study, cell, selection, layout, where),
        folded=not study.source(cell.method).foreign,
    )
    with _failing("sanity checks"):
        found = sanity_checks.examine(model, examples, study.evaluation, study.threat, where)
    common = {
        **{name: getattr(cell, name) for name in KEY if hasattr(cell, name)},
        "selection": selection,
        "origin": origin,
        "potentially_unreliable": found.potentially_unreliable([r.outcome for r in results]),
        **measured.columns,
        **(_training_columns(layout, cell, selection) if own else {}),
        "model_bytes": weights.bytes_without_zeros(model.state_dict()),
        "eval_device": device_name(where),
        "settings_digest": fingerprint.digest,
        "code_digest": fingerprint.code,
        "data_checksum": splits.checksum(),
        **guessing(splits.test, splits.classes),
        "model_checksum": _checksum(model, target.weights),
        **provenance.current(),
    }
    with atomic(target.flags) as temporary, temporary.open("wb") as handle:
        outcomes: dict[str, np.ndarray] = {}
        for result in results:
            outcomes |= result.arrays(examples)
        np.savez_compressed(handle, labels=examples.y_N.numpy(), **outcomes)
    rows = [row for result in results for row in result.rows(common)]
    kept = Record(
        rows,
        measured.layers,
        measured.histogram,
        found.numbers,
        file_checksum(target.flags),
    )
    write_record(target.record, kept)
    shutil.rmtree(parts, ignore_errors=True)
    return target.record


def _checksum(model: nn.Module, file: Path | None) -> str:
    """What tells the weights from others: of their file, or of all tensors."""
    return weights.checksum(model.state_dict()) if file is None else file_checksum(file)


def surrogates(
    study: Study, cell: Cell, selection: Selection, layout: Layout, device: torch.device
) -> Callable[[str], nn.Module]:
    """network(method) -> the network of another cell that an attack on `cell` may use."""

    @functools.cache
    def network(method: str) -> nn.Module:
        other = study.surrogate(cell, method)
        splits = datasets.load(study.base("dataset", other.dataset), study.datasets[other.dataset])
        model, _ = external.opened(study, other, splits, layout, selection)
        return model.to(device).eval()

    return network


def in_words(record: Path) -> str:
    """The accuracies of a record, one a line, and where it is."""
    rows = [row for row in read_record(record).rows if row.component == "all"]
    first = rows[0]
    reasons = first.potentially_unreliable
    lines = [f"{row.attack:12s} {100 * row.accuracy:6.2f} %{_version(row)}" for row in rows]
    return "\n".join(
        [
            f"{first.nonzero:,} of {first.prunable:,} prunable weights are nonzero "
            f"(sparsity {first.sparsity_reached:.4f}); first {first.n_examples} test images, "
            f"{rows[-1].norm} eps {rows[-1].eps:.5g}",
            *lines,
            *([f"potentially unreliable: {reasons}"] if reasons else []),
            f"record: {record}",
        ]
    )


def _version(row: Row) -> str:
    """What an attack ran, unless it is what its name stands for."""
    return "" if row.version in (None, "standard") else f" (version {row.version})"


def first_examples(test: Part, n: int, classes: int) -> Part:
    """The first n test images. Raises UsageError unless they are in [0,1] with valid labels."""
    if n > len(test):
        raise UsageError(f"evaluation.n_examples = {n}: the test split has {len(test)} images")
    part = Part(test.x_NCHW[:n], test.y_N[:n])
    low, high = float(part.x_NCHW.min()), float(part.x_NCHW.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(f"test images: expected values in [0,1], found [{low:g}, {high:g}]")
    if int(part.y_N.min()) < 0 or int(part.y_N.max()) >= classes:
        raise UsageError(f"test labels: expected 0..{classes - 1}")
    return part


def guessing(test: Part, classes: int) -> dict[str, Any]:
    """Columns of a row: the classes of the data set, and the accuracy of naming the largest one.

    Of all test images, not of the attacked ones, among which a class may be missing.
    """
    largest = int(test.y_N.bincount().max())
    return {"classes": classes, "chance": max(1 / classes, largest / len(test))}


@dataclass(frozen=True)
class AttackResult:
    """One attack's outcome, spread over all examples; `where` are those that it saw (int).

    attacked_on: "view" or "network", whose passes the attack used.
    """

    attack: str
    robust: dict[str, Tensor]
    outcome: Outcome
    threat: AttackContext
    seconds: float
    where: Tensor
    attacked_on: str = "network"

    def rows(self, common: dict[str, Any]) -> list[Row]:
        """A row for each component of a composite attack, and one for the whole ("all")."""
        return [self._row(name, flags, common) for name, flags in self.robust.items()]

    def _row(self, component: str, flags: Tensor, common: dict[str, Any]) -> Row:
        n, correct = len(flags), int(flags.sum())
        low, high = wilson_interval(correct, n)
        whole = component == "all"
        return Row(
            **common,
            attack=self.attack,
            component=component,
            accuracy=correct / n,
            n_correct=correct,
            n_examples=n,
            ci_low=low,
            ci_high=high,
            norm=self.threat.norm,
            eps=self.threat.eps,
            **self.outcome.settings,
            attack_seed=self.threat.seed,
            warnings="; ".join(self.outcome.warnings) if whole else "",
            max_perturbation=self.outcome.max_perturbation if whole else None,
            nan_count=self.outcome.nan_count if whole else 0,
            attack_seconds=round(self.seconds, 3) if whole else None,
            attacked_on=self.attacked_on,
        )

    def arrays(self, examples: Part) -> dict[str, np.ndarray]:
        """Per-image outcomes, named attack.component; distances and pictures beside them."""
        found = {f"{self.attack}.{name}": value.numpy() for name, value in self.robust.items()}
        if self.outcome.distances is not None:
            # What was wrong without an attack has length 0.
            lengths = torch.zeros(len(examples))
            lengths[self.where] = self.outcome.distances.float()
            found[f"{self.attack}.distance"] = lengths.numpy()
        shown = {int(self.where[i]): picture for i, picture in self.outcome.pictures.items()}
        if shown:
            pairs = [torch.stack([examples.x_NCHW[i], p.image]) for i, p in shown.items()]
            found[f"{self.attack}.pictured"] = np.array(list(shown))
            found[f"{self.attack}.taken_for"] = np.array([p.taken_for for p in shown.values()])
            found[f"{self.attack}.pictures"] = torch.stack(pairs).half().numpy()
        return found


def attack_model(
    model: nn.Module,
    examples: Part,
    names: list[str],
    *,
    settings: Evaluation,
    threat: Threat,
    device: torch.device,
    cache: Path | None = None,
    surrogate: Callable[[str], nn.Module] = no_surrogate,
    folded: bool = False,
) -> list[AttackResult]:
    """Run the named attacks, `clean` first, on the images that are classified correctly.

    Finished parts are kept in the folder `cache` and taken from there by a later call with the
    same network, images and settings. With `folded`, the network's folded view is attacked: the
    same outputs to rounding, sooner; where that fails, the network itself. A network of foreign
    code is attacked as it is.

    Raises AssertionError if any module of the model is in train mode.
    """
    model.eval()
    assert not any(module.training for module in model.modules()), "expected eval mode"
    results: list[AttackResult] = []
    correct = torch.ones(len(examples), dtype=torch.bool)
    first = examples.x_NCHW[: proof.IMAGES].to(device)
    attacked = folding.view_of(model, first) if folded else model
    asked = identity(model, examples, device) if cache else ""
    for name in names:
        params = settings.attacks[name]
        reach = threat.adjusted(params)
        faced = AttackContext(
            reach.norm,
            reach.eps if isinstance(params, AttackParams) else 0.0,
            derive_seed("attack", name, settings.seed) % 2**31,
            settings.batch_size,
            device,
            report=lambda text, name=name: print(f"{name}: {text}", flush=True),
            surrogate=surrogate,
            images=examples.x_NCHW,
        )
        base = getattr(params, "base", name)
        if cache:
            name_of_other = getattr(params, "surrogate", None)
            other = name_of_other and identity(surrogate(name_of_other), examples, device)
            basis = _basis(
                asked, base, faced, attacked_on=folding.runs_on(attacked), surrogate=other
            )
            faced = replace(faced, cache=Cache(cache, basis))
        attack = registry.load("attack", base)
        x_NCHW, y_N = examples.x_NCHW[correct], examples.y_N[correct]
        with _failing(name):
            outcome, seconds = _run(attack, attacked, (x_NCHW, y_N), params, faced)
        robust = {part: _spread(flags, correct) for part, flags in outcome.components.items()}
        whole = list(robust.values())[-1]
        robust = robust if "all" in robust else robust | {"all": whole}
        where = correct.nonzero().squeeze(1)
        used = folding.runs_on(attacked)
        results.append(AttackResult(name, robust, outcome, faced, seconds, where, used))
        print(f"{name}: {int(whole.sum())}/{len(whole)} correct, {seconds:.1f} s", flush=True)
        if name == "clean":
            correct = whole
    return results


def _basis(asked: str, attack: str, threat: AttackContext, **further: Any) -> str:
    """The name of what is kept of an attack; `asked` is the network's, with the images."""
    on_cpu = threat.device.type == "cpu"
    return fingerprints.part(
        asked,
        registry.entry("attack", attack).module,
        norm=threat.norm,
        eps=threat.eps,
        seed=threat.seed,
        batch_size=threat.batch_size,
        device="cpu" if on_cpu else device_name(threat.device),
        **further,
    )


def _run(
    attack: ModuleType,
    model: nn.Module,
    images: tuple[Tensor, Tensor],
    params: Any,
    threat: AttackContext,
) -> tuple[Outcome, float]:
    """The outcome of one attack and what it took in seconds; one that was kept is not run again."""
    name = params.model_dump_json()
    if arrays := threat.cache.get(name):
        outcome = Outcome.of_arrays(arrays)
        threat.report("taken from an earlier run")
        return outcome, outcome.earlier_seconds
    began = time.perf_counter()
    outcome = attack.run(model, *images, params, threat)
    seconds = outcome.earlier_seconds + time.perf_counter() - began
    threat.cache.put(name, **outcome.arrays(seconds))
    return outcome, seconds


def _spread(flags: Tensor, where: Tensor) -> Tensor:
    """Flags of a subset of images as flags of all; images outside it are not robust."""
    spread = torch.zeros_like(where)
    spread[where] = flags.cpu()
    return spread


@dataclass(frozen=True)
class Measured:
    """Size of a network: columns of a result row, live weights by layer and by magnitude."""

    columns: dict[str, Any]
    layers: list[dict[str, Any]]
    histogram: list[dict[str, float]]


def measure(model: nn.Module, image_shape: tuple[int, int, int]) -> Measured:
    """Count live weights and multiply-accumulates of one image, dense and without zeros.

    The sparse count is what an ideal sparse kernel would do; no such kernel is timed here. A layer
    counts as often as it is used, which may be never. Without prunable layers all counts are 0.
    """
    modules = prunable(model)
    positions = dict.fromkeys(modules, 0)

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            positions[name] += output.numel() // module.weight.shape[0]

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    device = next(iter([*model.parameters(), torch.zeros(0)])).device
    with torch.no_grad():
        model(torch.zeros(1, *image_shape, device=device))
    for hook in hooks:
        hook.remove()
    layers = [
        {
            "layer": name,
            "size": module.weight.numel(),
            "nonzero": int(module.weight.detach().count_nonzero()),
            "positions": positions[name],
        }
        for name, module in modules.items()
    ]
    size, nonzero = (sum(layer[key] for layer in layers) for key in ("size", "nonzero"))
    columns = {
        "prunable": size,
        "nonzero": nonzero,
        "sparsity_reached": 1 - nonzero / size if size else 0.0,
        "layers": len(layers),
        "dense_macs": sum(layer["size"] * layer["positions"] for layer in layers),
        "sparse_macs": sum(layer["nonzero"] * layer["positions"] for layer in layers),
    }
    return Measured(columns, layers, magnitude_histogram(model))


def magnitude_histogram(model: nn.Module) -> list[dict[str, float]]:
    """Counts of live prunable weights by magnitude: ten bins a decade, from 1e-12 to 100.

    The smallest bin goes down to 0 and the largest up to infinity, so that none is left out.
    """
    exponents = torch.arange(-120, 21, dtype=torch.float64) / 10
    counts = torch.zeros(len(exponents) + 1, dtype=torch.int64)
    for module in prunable(model).values():
        size = module.weight.detach().abs()
        place = torch.bucketize(size[size > 0].double().log10().cpu(), exponents, right=True)
        counts += torch.bincount(place, minlength=len(counts))
    edges = [0.0, *(10**exponents).tolist(), 1e3]
    return [
        {"low": low, "high": high, "count": count}
        for low, high, count in zip(edges, edges[1:], counts.tolist(), strict=False)
        if count
    ]


def _training_columns(layout: Layout, cell: Cell, selection: Selection) -> dict[str, Any]:
    """Cost of training, if this suite trained the weights."""
    if not layout.training(cell).exists():
        return {}
    record = read_json(layout.training(cell))
    cost = record["cost"]
    if cost is None:  # trained elsewhere
        return {}
    return {
        "selected_epoch": record["selected"][selection]["epoch"],
        "epochs": cost["epochs"],
        "forward_passes": cost["forward_passes"],
        "backward_passes": cost["backward_passes"],
        "train_seconds": cost["seconds"],
        "peak_active_weights": cost["peak_active_weights"],
        "peak_memory_mb": cost["peak_memory_mb"],
        "train_device": cost["device"],
        "failure": record["failure"],
    }
