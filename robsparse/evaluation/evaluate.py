"""The evaluation of one network, from its weights to its record.

It uses only a plain torch model and test images, never a method.
"""

import shutil
from pathlib import Path

from robsparse.base.files import locked
from robsparse.compute.machine import pick_device, prepare
from robsparse.evaluation import corruptions, record, sanity_checks
from robsparse.evaluation import job as jobs
from robsparse.evaluation.cache import Cache
from robsparse.evaluation.measure import latency_ms, measure_network
from robsparse.evaluation.runner import attack_model, evaluation_errors
from robsparse.fast import proof
from robsparse.schema.evaluation import Selection
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study
from robsparse.study.targets import Target


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
    """Attack one network, and write its record and the outcome of each image.

    Args:
        study, cell, selection, layout: the network, and the paths of its files.
        target: other weights and result files. None: those of the cell in the folder of the study.
        fresh: first delete the cache of an interrupted evaluation.
        device, threads: replace those of the study.

    Returns:
        The path of the record.

    Raises:
        UsageError: if the weights are missing or damaged, the images are not what an attack
            expects, the network does not map them to logits, or another process evaluates the
            same network. Nothing is written then.
        EvaluationError: if the evaluation fails later. The cache then has the finished parts.
    """
    prepare(threads or study.machine.threads)
    where = pick_device(device or study.machine.device)
    job = jobs.resolve(study, cell, selection, layout, target=target, device=where)
    with locked(job.cache):
        if fresh:
            Cache(job.cache).clear()
        _measure(job)
        shutil.rmtree(job.cache, ignore_errors=True)
    return job.record


def _measure(job: jobs.Job) -> None:
    """Attack the network of a job, and write the results. Finished parts go to the cache."""
    study, cell, device = job.study, job.cell, job.device
    with evaluation_errors("counting weights"):
        size = measure_network(job.model, job.splits.image_shape)
    with evaluation_errors("corruptions"):
        corrupted = corruptions.measure(
            job.model, job.examples, study.evaluation, cell.dataset, device
        )
    planned = study.planned[cell]
    results = attack_model(
        job.model,
        job.examples,
        planned.attacks[job.selection],
        seed=study.evaluation.seed,
        batch_size=study.evaluation.batch_size,
        device=device,
        cache=job.cache,
        surrogate=job.surrogate,
        folded=not study.source(cell.method).foreign,
    )
    with evaluation_errors("sanity checks"):
        findings = sanity_checks.examine(
            job.model,
            job.examples,
            study.evaluation,
            planned.sanity_check_threat,
            device,
            folder=job.cache,
        )
    with evaluation_errors("latency"):
        latency = _latency_ms(job) if study.evaluation.latency else None
    record.write(job, size, results, findings, corrupted, latency_ms=latency)


def _latency_ms(job: jobs.Job) -> float:
    """Return the latency of the network of a job; foreign code has no folded view."""
    first = job.examples.x_NCHW[: proof.IMAGES].to(job.device)
    folded = not job.study.source(job.cell.method).foreign
    return latency_ms(job.model, first, folded=folded)
