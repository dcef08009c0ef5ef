"""What makes a finished job run again: its settings and, if the study asks for it, its code.

The workflow passes these digests as rule parameters; Snakemake reruns a job whose parameters
changed. A new method's file is in the digest of that method alone, so nothing else runs again.
"""

import hashlib
from pathlib import Path

from robsparse.cells import Cell
from robsparse.config import Selection, Study, digest

_SHARED = (
    "cells.py",
    "augment.py",
    "imagesets.py",
    "datasets/__init__.py",
    "models/__init__.py",
    "compact.py",
    "counts.py",
    "networks.py",
    "sparsity.py",
    "machine.py",
    "frozen.py",
    "frozen_layers.py",
    "small_maps.py",
    "backends.py",
    "perturb.py",
    "proof.py",
    "structure.py",
    "weights.py",
)
_TRAINING = (
    "stages.py",
    "training.py",
    "batches.py",
    "objectives.py",
    "connections.py",
    "dynamic.py",
    "wiring.py",
    "scores.py",
    "checkpoints.py",
    "validation.py",
)
_EVALUATION = ("evaluation.py", "attacks.py", "doubts.py")


def training_digest(study: Study, cell: Cell) -> str:
    """Digest of all that decides the weights of `cell`."""
    return _combine(study, study.training_settings(cell), _training_files(study, cell))


def evaluation_digest(study: Study, cell: Cell, selection: Selection) -> str:
    """Digest of all that decides the outcome of attacking the weights of `cell`."""
    attacks = study.evaluation.selections[selection]
    files = _training_files(study, cell) + _core(_EVALUATION)
    files += [study.entry("attack", name).path for name in attacks]
    return _combine(study, study.evaluation_settings(cell, selection), files)


def _combine(study: Study, settings: dict, files: list[Path]) -> str:
    if study.machine.rerun_on_code_change:
        code = b"".join(path.read_bytes() for path in files)
        settings = settings | {"code": hashlib.sha256(code).hexdigest()}
    return digest(settings)


def _training_files(study: Study, cell: Cell) -> list[Path]:
    if study.is_external(cell.method):
        return _core((*_SHARED, "external.py"))
    start = study.starting_cell(cell)
    methods = [cell.method] + ([start.method] if start else [])
    return [
        *_core(_SHARED + _TRAINING),
        *_with_helpers(study.entry("dataset", cell.dataset).path),
        *_with_helpers(study.entry("arch", cell.arch).path),
        *(study.entry("method", name).path for name in methods),
    ]


def _with_helpers(path: Path) -> list[Path]:
    """A registered file and those beside it that it may share with others."""
    return [path, *sorted(path.parent.glob("_[!_]*.py"))]


def _core(names: tuple[str, ...]) -> list[Path]:
    return [Path(__file__).parent / name for name in names]
