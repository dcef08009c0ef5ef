"""Builds and writes the results of an evaluation: the record, and the outcome of each image."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robsparse.base.files import file_checksum, write_arrays
from robsparse.compute.machine import device_name
from robsparse.datasets import Part
from robsparse.evaluation.corruptions import Corrupted
from robsparse.evaluation.job import Job
from robsparse.evaluation.measure import NetworkSize
from robsparse.evaluation.runner import AttackResult
from robsparse.evaluation.sanity_checks import Findings
from robsparse.kernels.library import instructions
from robsparse.networks import compact, weights
from robsparse.records import provenance
from robsparse.records.evaluation_record import Record, read_record, write_record
from robsparse.records.rows import KEY, Row, wilson_interval
from robsparse.records.training_record import read_training


def write(
    job: Job,
    size: NetworkSize,
    results: list[AttackResult],
    findings: Findings,
    corrupted: Corrupted,
    *,
    latency_ms: float | None,
) -> None:
    """Write the outcome of each image, and the record with the checksum of this file.

    latency_ms: the time of one image, or None if it was not measured.
    """
    outcomes: dict[str, Any] = {**corrupted.outcomes()}  # arrays
    for result in results:
        outcomes |= image_outcomes(result, job.examples)
    write_arrays(job.outcomes, {"labels": job.examples.y_N.numpy()} | outcomes)
    reasons = findings.potentially_unreliable([result.outcome for result in results])
    measured = {"potentially_unreliable": reasons, "latency_ms": latency_ms}
    common = network_columns(job) | size.columns | measured
    rows = [row for result in results for row in result_rows(result, common)]
    checksum = file_checksum(job.outcomes)
    record = Record(rows, size.layers, size.histogram, findings.numbers, checksum, corrupted.rows())
    write_record(job.record, record)


def network_columns(job: Job) -> dict[str, Any]:
    """Return the columns that all rows of a network share, without those of its size."""
    return {
        **{name: getattr(job.cell, name) for name in KEY if hasattr(job.cell, name)},
        "selection": job.selection,
        "origin": job.origin,
        **(_training_columns(job.training, job.selection) if job.training else {}),
        "model_bytes": compact.size(job.model.state_dict()),
        "model_checksum": _checksum(job.model, job.weights),
        "data_checksum": job.splits.checksum(),
        **chance_columns(job.splits.test, job.splits.classes),
        "eval_device": device_name(job.device),
        "settings_digest": job.fingerprint.digest,
        "code_digest": job.fingerprint.code,
        **provenance.current(),
        "kernels": instructions(job.device.type),
    }


def _checksum(model: nn.Module, file: Path | None) -> str:
    """Return the checksum of the file of the weights or, without a file, of all tensors."""
    return weights.checksum(model.state_dict()) if file is None else file_checksum(file)


def chance_columns(test: Part, classes: int) -> dict[str, Any]:
    """Return the columns `classes` and `chance` (the accuracy of always predicting one class).

    test: all test images. In the attacked images, a class may be missing.
    """
    largest = int(test.y_N.bincount().max())
    return {"classes": classes, "chance": max(1 / classes, largest / len(test))}


def _training_columns(path: Path, selection: str) -> dict[str, Any]:
    """Return the columns of the training cost, if this suite trained the weights."""
    if not path.exists():
        return {}
    record = read_training(path)
    cost = record["cost"]
    if cost is None:  # an external model
        return {}
    return {
        "selected_epoch": record["selected"][selection]["epoch"],
        "epochs": cost["epochs"],
        "forward_passes": cost["forward_passes"],
        "backward_passes": cost["backward_passes"],
        "train_seconds": cost["seconds"],
        "peak_active_weights": cost["peak_active_weights"],
        "training_state_bytes": cost.get("training_state_bytes"),
        "peak_memory_mb": cost["peak_memory_mb"],
        "train_device": cost["device"],
        "failure": record["failure"],
    }


def result_rows(result: AttackResult, common: dict[str, Any]) -> list[Row]:
    """Return a row for each component of an attack, and one for the whole attack ("all").

    common: the columns that all rows of the network share.
    """
    return [_row(result, name, flags, common) for name, flags in result.robust.items()]


def _row(result: AttackResult, component: str, flags: Tensor, common: dict[str, Any]) -> Row:
    n, correct = len(flags), int(flags.sum())
    low, high = wilson_interval(correct, n)
    outcome, context = result.outcome, result.context
    whole = component == "all"
    return Row(
        **common,
        attack=result.attack,
        component=component,
        accuracy=correct / n,
        n_correct=correct,
        n_examples=n,
        ci_low=low,
        ci_high=high,
        norm=context.norm,
        eps=context.eps,
        **outcome.settings,
        attack_seed=context.seed,
        warnings="; ".join(outcome.warnings) if whole else "",
        max_perturbation=outcome.max_perturbation if whole else None,
        nan_count=outcome.nan_count if whole else 0,
        attack_seconds=round(result.seconds, 3) if whole else None,
        attacked_on=result.attacked_on,
    )


def image_outcomes(result: AttackResult, examples: Part) -> dict[str, np.ndarray]:
    """Return arrays `attack.component` of robust images, with distances and pictures."""
    attack, outcome = result.attack, result.outcome
    found = {f"{attack}.{name}": value.numpy() for name, value in result.robust.items()}
    if outcome.distances is not None:
        # An image that is misclassified without an attack has distance 0.
        lengths = torch.zeros(len(examples))
        lengths[result.indices] = outcome.distances.float()
        found[f"{attack}.distance"] = lengths.numpy()
    pictures = {int(result.indices[i]): picture for i, picture in outcome.pictures.items()}
    if pictures:
        pairs = [torch.stack([examples.x_NCHW[i], p.image]) for i, p in pictures.items()]
        found[f"{attack}.pictured"] = np.array(list(pictures))
        found[f"{attack}.predicted"] = np.array([p.predicted for p in pictures.values()])
        found[f"{attack}.pictures"] = torch.stack(pairs).half().numpy()
    return found


def summary(path: Path) -> str:
    """Return lines with the accuracies of a record, and its path."""
    rows = [row for row in read_record(path).rows if row.component == "all"]
    first, corrupted = rows[0], read_record(path).corruptions
    reasons = first.potentially_unreliable
    lines = [f"{row.attack:12s} {100 * row.accuracy:6.2f} %{_version(row)}" for row in rows]
    return "\n".join(
        [
            f"{first.nonzero:,} of {first.prunable:,} prunable weights are nonzero "
            f"(sparsity {first.sparsity_reached:.4f}); first {first.n_examples} test images, "
            f"{rows[-1].norm} eps {rows[-1].eps:.5g}",
            *lines,
            *([_corrupted(corrupted)] if corrupted else []),
            *([f"potentially unreliable: {reasons}"] if reasons else []),
            f"record: {path}",
        ]
    )


def _corrupted(rows: list[dict[str, Any]]) -> str:
    """Return a line with the mean over corruptions and severities."""
    mean = sum(row["n_correct"] / row["n_examples"] for row in rows) / len(rows)
    return (
        f"{'corruptions':12s} {100 * mean:6.2f} % ({rows[0]['source']}, mean over corruptions and "
        "severities)"
    )


def _version(row: Row) -> str:
    """Return the version of an attack, or "" for the standard version."""
    return "" if row.version in (None, "standard") else f" (version {row.version})"
