"""What decides an artefact: a network, an evaluation, a part of one, the tables, the figures.

This is the one place that answers when something must be made again. The workflow passes
`Fingerprint.plan` to Snakemake, which runs a job again when it differs; records keep the parts, and
`collect` compares them. A new method's file counts only for the cells that use it.

No torch in here. The table of what runs again after which change is in docs/staleness.md.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from robsparse.base.files import file_checksum
from robsparse.records import provenance
from robsparse.schema.evaluation import Selection
from robsparse.schema.fields import Decides
from robsparse.study import source_code
from robsparse.study.cells import Cell
from robsparse.study.parts import PartKind
from robsparse.study.planned import Attack
from robsparse.study.study import Study

# Settings that decide no number: names in print, and what is resolved before.
_UNREAD = {"label", "starts_from"}
# Settings of `training` that only some objectives read.
_READ_BY = {
    "beta": ("trades", "mart", "rst"),
    "rst_file": ("rst",),
    "rst_fraction": ("rst",),
    "synthetic_file": ("natural", "at", "mat", "trades", "mart"),
    "synthetic_fraction": ("natural", "at", "mat", "trades", "mart"),
}


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What decides one artefact.

    settings: resolved settings of that artefact alone, contents of the files that they name, and
        the settings of all networks that it is made from.
    modules: the code in use, with all that it imports. beside: a pattern of further files.
    counts_code: whether a change of code or libraries alone makes the artefact again.
    """

    settings: dict[str, Any]
    modules: tuple[str, ...]
    counts_code: bool
    beside: str = ""

    @property
    def digest(self) -> str:
        """Digest of the settings."""
        return digest(self.settings)

    @property
    def code(self) -> str:
        """Digest of the source code in use."""
        return source_code.digest(*self.modules, beside=self.beside)

    @property
    def plan(self) -> str:
        """Digest of all that makes the artefact again when it changes."""
        return self.whole() if self.counts_code else self.digest

    def whole(self, *further: Any) -> str:
        """Digest of everything, and of what else decides where it is made, such as the device."""
        return digest([self.settings, self.code, provenance.libraries(), *further])

    def kept(self) -> dict[str, Any]:
        """What records say of it."""
        return {
            "settings": self.settings,
            "settings_digest": self.digest,
            "code_digest": self.code,
            "libraries": provenance.libraries(),
        }


def training(study: Study, cell: Cell) -> Fingerprint:
    """What decides the weights of `cell`, those that it starts from included."""
    own = _external_settings if study.is_external(cell.method) else _training_settings
    return _of(study, own(study, cell), _training_code(study, cell))


def evaluation(study: Study, cell: Cell, selection: Selection) -> Fingerprint:
    """What decides the outcome of attacking the saved weights of `cell`."""
    others = study.surrogates(cell, selection)
    planned = study.planned[cell]
    attacks = planned.attacks[selection]
    settings = {
        "training": training(study, cell).settings,
        "selection": selection,
        "evaluation": study.evaluation.model_dump(
            mode="json", include={"n_examples", "batch_size", "seed"}
        ),
        "threat": _settings(planned.sanity_check_threat),
        "attacks": {attack.name: _attack_settings(attack) for attack in attacks},
        "sanity_checks": _settings(study.evaluation.sanity_checks),
        "surrogates": [training(study, other).settings for other in others],
    }
    code = {f"{source_code.PACKAGE}.evaluation.evaluate"}
    code |= {study.entry("attack", attack.name).module for attack in attacks}
    return _of(study, settings, code.union(*(_training_code(study, c) for c in (cell, *others))))


def collected(study: Study) -> Fingerprint:
    """What decides the collected tables: all networks, all evaluations, the collecting code."""
    settings = {
        "study": study.study,
        "networks": {cell.key: training(study, cell).plan for cell in study.cells()},
        "evaluations": {
            f"{cell.key} {selection}": evaluation(study, cell, selection).plan
            for cell in study.cells()
            for selection in study.evaluation.selections
        },
    }
    return _of(study, settings, {f"{source_code.PACKAGE}.collection.collect"}, always=True)


def figures(study: Study, captions: list[Path]) -> Fingerprint:
    """What decides tables, plots and report, besides the collected tables.

    captions: files of text that Snakemake's own report shows beside them.
    """
    printed: dict[PartKind, Iterable[str]] = {
        "attack": study.attacks,
        "method": [*study.methods, *study.models],
        "dataset": study.datasets,
        "arch": study.archs,
    }
    settings = {
        "study": study.settings(),
        "cells": [cell.key for cell in study.cells()],
        "labels": {
            kind: {name: study.label(kind, name) for name in names}
            for kind, names in printed.items()
        },
        "published": [[content(name) for name in table.published] for table in study.tables],
        "captions": [content(str(path)) for path in captions],
    }
    code = {f"{source_code.PACKAGE}.figures.report"}
    code |= {study.entry("attack", name).module for name in study.attacks}
    return _of(study, settings, code, always=True, beside="*.mplstyle")


def cached_attack(network: str, attack: str, **decided: Any) -> str:
    """What decides the cached results of an attack, besides the attack's own parameters.

    network: what is attacked and on which images, see `robsparse.evaluation.cache.network_digest`.
    attack: its module. decided: all else, such as norm, eps, seed, batch size and device.
    """
    code = source_code.digest(f"{source_code.PACKAGE}.evaluation.evaluate", attack)
    return digest([network, code, provenance.libraries(), decided])


def digest(value: Any) -> str:
    """Short SHA-256 of what JSON can hold, stable across machines and key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def content(name: str) -> str:
    """Digest of a file, or of the names and contents of all files in a folder; "" if absent."""
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return digest([[p.relative_to(path).as_posix(), content(str(p))] for p in files])
    if not path.is_file():
        return ""
    status = path.stat()
    return _content(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.cache
def _content(path: Path, size: int, mtime_ns: int) -> str:
    return file_checksum(path)


def _of(
    study: Study, settings: dict[str, Any], code: set[str], always: bool = False, beside: str = ""
) -> Fingerprint:
    counts_code = always or study.machine.rerun_on_code_change
    return Fingerprint(settings, tuple(sorted(code)), counts_code, beside)


def _training_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Resolved settings of one training run, and of the one that it starts from."""
    plan, start = study.planned[cell], study.starting_cell(cell)
    unread = {name for name, readers in _READ_BY.items() if cell.objective not in readers}
    if plan.training.synthetic_file is None:
        unread.add("synthetic_fraction")
    return {
        "cell": cell.key,
        "dataset": _settings(study.datasets[cell.dataset], {"augmentation"}),
        "augmentation": _settings(plan.augmentation),
        "arch": _settings(study.archs[cell.arch]),
        "method": _settings(plan.params),
        "threat": _settings(plan.training_threat),
        "training": _settings(plan.training, {*unread, "augmentation", "eps"}),
        "start": _training_settings(study, start) if start else None,
    }


def _attack_settings(attack: Attack) -> dict[str, Any]:
    """Settings of an attack, and how far it may go."""
    reach = {"norm": attack.norm, "eps": attack.eps}
    return _settings(attack.params, {"norm", "eps"}) | reach


def _external_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """What decides a network that was trained elsewhere; its file's name does not."""
    source = study.source(cell.method)
    module = source.name.partition(":")[0] if source.kind == "callable" else None
    return {
        "cell": cell.key,
        "model": _settings(study.models[cell.method]),
        "dataset": _settings(study.datasets[cell.dataset], {"augmentation"}),
        "arch": _settings(study.archs[cell.arch]) if cell.arch in study.archs else None,
        "norm": study.threat.norm if source.kind == "zoo" else None,
        "code": source_code.digest(module) if module else None,
    }


def _training_code(study: Study, cell: Cell) -> set[str]:
    """The modules whose code, and whose imports' code, decides the weights of a cell."""
    used = {study.entry("dataset", cell.dataset).module}
    if cell.arch in study.archs:
        used.add(study.entry("arch", cell.arch).module)
    if study.is_external(cell.method):
        return used | {f"{source_code.PACKAGE}.networks.external"}
    start = study.starting_cell(cell)
    used |= {study.entry("method", c.method).module for c in (cell, start) if c is not None}
    return used | {f"{source_code.PACKAGE}.training.loop"}


def _settings(model: BaseModel, unread: Set[str] = frozenset()) -> dict[str, Any]:
    """All values as JSON has them, without those that decide no number.

    A path of a file that decides stands there as the file's content; other places on disk and
    labels are left out.
    """
    fields = type(model).model_fields
    places = {
        name: mark
        for name, field in fields.items()
        for mark in field.metadata
        if isinstance(mark, Decides)
    }
    values = model.model_dump(mode="json", exclude={*unread, *_UNREAD, *places})
    named = {name: getattr(model, name) for name, mark in places.items() if mark.content}
    return values | {
        name: content(path) for name, path in named.items() if path and name not in unread
    }
