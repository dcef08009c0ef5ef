"""Fingerprints of results: of networks, evaluations, cached attacks, tables and figures.

A fingerprint contains everything that decides a result. Only this module decides when a result must
be computed again. The workflow passes `Fingerprint.plan` to Snakemake, which runs a job again if it
has changed. Records store the parts of the fingerprint, and `collect` compares them. The file of a
method is part of the fingerprint only for cells that use the method.

docs/staleness.md has the table of what runs again after which change. Imports no torch.
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

# Settings that change no result: printed names, and names that are already resolved.
_UNREAD = {"label", "starts_from"}
# Settings that are left out while they are null: studies from before them keep their fingerprints.
_OFF = {"train_examples", "classes"}
# Settings of `training` that only these objectives read.
_READ_BY = {
    "beta": ("trades", "mart", "rst"),
    "rst_file": ("rst",),
    "rst_fraction": ("rst",),
    "synthetic_file": ("natural", "at", "mat", "trades", "mart"),
    "synthetic_fraction": ("natural", "at", "mat", "trades", "mart"),
}


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Everything that decides one result.

    settings: the resolved settings of this result, digests of the files that they name, and the
        settings of all networks that the result depends on.
    modules: names of the modules in use; the modules that they import are added.
    counts_code: whether a change of only code or libraries makes the result out of date.
    beside: patterns of other files in the folders of the modules that count as code.
    """

    settings: dict[str, Any]
    modules: tuple[str, ...]
    counts_code: bool
    beside: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the settings."""
        return digest(self.settings)

    @property
    def code(self) -> str:
        """Digest of the source code."""
        return source_code.digest(*self.modules, beside=self.beside)

    @property
    def plan(self) -> str:
        """Digest for the workflow: the result is computed again when it changes."""
        return self.whole() if self.counts_code else self.digest

    def whole(self, *further: Any) -> str:
        """Digest of settings, code, libraries and `further` values, for example the device."""
        return digest([self.settings, self.code, provenance.libraries(), *further])

    def as_record(self) -> dict[str, Any]:
        """The fields that records store."""
        return {
            "settings": self.settings,
            "settings_digest": self.digest,
            "code_digest": self.code,
            "libraries": provenance.libraries(),
        }


def training(study: Study, cell: Cell) -> Fingerprint:
    """Fingerprint of the weights of a cell; contains the network that its training starts from."""
    return _fingerprint(study, _network_settings(study, cell), _training_code(study, cell))


def evaluation(study: Study, cell: Cell, selection: Selection) -> Fingerprint:
    """Fingerprint of the evaluation of the saved weights of a cell."""
    others = study.surrogates(cell, selection)
    planned = study.planned[cell]
    attacks = planned.attacks[selection]
    settings: dict[str, Any] = {
        "training": _network_settings(study, cell),
        "selection": selection,
        "evaluation": study.evaluation.model_dump(
            mode="json", include={"n_examples", "batch_size", "seed"}
        ),
        "threat": _settings(planned.sanity_check_threat),
        "attacks": {attack.name: _attack_settings(attack) for attack in attacks},
        "sanity_checks": _settings(study.evaluation.sanity_checks),
        "surrogates": [_network_settings(study, other) for other in others],
    }
    if (corruptions := study.evaluation.corruptions) is not None:
        folder = corruptions.folders.get(cell.dataset)
        settings["corruptions"] = content(folder) if folder else "generated"
    if study.evaluation.latency:
        settings["latency"] = True
    code = {f"{source_code.PACKAGE}.evaluation.evaluate"}
    code |= {study.entry("attack", attack.name).module for attack in attacks}
    code = code.union(*(_training_code(study, c) for c in (cell, *others)))
    return _fingerprint(study, settings, code)


def collected(study: Study) -> Fingerprint:
    """Fingerprint of the collected tables: all networks, all evaluations, the code of collect."""
    settings = {
        "study": study.study,
        "networks": {cell.key: training(study, cell).plan for cell in study.cells()},
        "evaluations": {
            f"{cell.key} {selection}": evaluation(study, cell, selection).plan
            for cell in study.cells()
            for selection in study.evaluation.selections
        },
    }
    code = {f"{source_code.PACKAGE}.collection.collect"}
    return _fingerprint(study, settings, code, always=True)


def figures(study: Study, captions: list[Path]) -> Fingerprint:
    """Fingerprint of tables, plots and report, without the collected tables.

    captions: text files that the report of Snakemake shows beside the plots.
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
    return _fingerprint(
        study, settings, code, always=True, beside=("*.mplstyle", "*.j2", "*.css", "*.js")
    )


def cached_attack(network: str, attack: str, **decided: Any) -> str:
    """Digest of everything that decides the cached results of an attack, without its parameters.

    Args:
        network: digest of the network and the images, see
            `robsparse.evaluation.cache.network_digest`.
        attack: module of the attack.
        decided: all other values, for example norm, eps, seed, batch size and device.
    """
    code = source_code.digest(f"{source_code.PACKAGE}.evaluation.evaluate", attack)
    return digest([network, code, provenance.libraries(), decided])


def digest(value: Any) -> str:
    """Short SHA-256 of a JSON value. It does not depend on the machine or the order of keys."""
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


def _fingerprint(
    study: Study,
    settings: dict[str, Any],
    code: set[str],
    always: bool = False,
    beside: tuple[str, ...] = (),
) -> Fingerprint:
    counts_code = always or study.machine.rerun_on_code_change
    return Fingerprint(settings, tuple(sorted(code)), counts_code, beside)


def _network_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Resolved settings that decide the weights of a cell."""
    own = _external_settings if study.is_external(cell.method) else _training_settings
    return own(study, cell)


def _training_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Resolved settings of one training run, and of the network that it starts from."""
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
    """Settings of an attack, with its resolved norm and eps."""
    reach = {"norm": attack.norm, "eps": attack.eps}
    return _settings(attack.params, {"norm", "eps"}) | reach


def _external_settings(study: Study, cell: Cell) -> dict[str, Any]:
    """Settings of an external model; the content of its file counts, the path does not."""
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
    """The modules that decide the weights of a cell, without the modules that they import."""
    used = {study.entry("dataset", cell.dataset).module}
    if cell.arch in study.archs:
        used.add(study.entry("arch", cell.arch).module)
    if study.is_external(cell.method):
        return used | {f"{source_code.PACKAGE}.networks.external"}
    start = study.starting_cell(cell)
    used |= {study.entry("method", c.method).module for c in (cell, start) if c is not None}
    return used | {f"{source_code.PACKAGE}.training.loop"}


def _settings(model: BaseModel, unread: Set[str] = frozenset()) -> dict[str, Any]:
    """The values of a section as JSON values, without those that change no result.

    Left out: `unread` settings, labels, and paths that decide no result. A path marked CONTENT is
    replaced by the digest of its file.
    """
    values, files = _values(_Same(model), frozenset(unread))
    return values | {name: content(path) for name, path in files.items()}


class _Same:
    """A section of a config as a key of a cache. Only the same object is equal to it."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.model is self.model

    def __hash__(self) -> int:
        return id(self.model)


@functools.lru_cache(maxsize=1024)
def _values(section: _Same, unread: Set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a section, and its paths marked CONTENT, by name.

    Sections never change, and the networks of a study share them. So their values are stored; the
    content of the files is not.
    """
    model = section.model
    fields = type(model).model_fields
    places = {
        name: mark
        for name, field in fields.items()
        for mark in field.metadata
        if isinstance(mark, Decides)
    }
    values = model.model_dump(mode="json", exclude={*unread, *_UNREAD, *places})
    for name in _OFF & values.keys():
        if values[name] is None:
            del values[name]
    named = {name: getattr(model, name) for name, mark in places.items() if mark.content}
    return values, {name: path for name, path in named.items() if path and name not in unread}
