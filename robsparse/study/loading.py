"""Reads the configuration of a study. No torch in here.

`load` reads one YAML file and either returns a `Study` or raises UsageError with one line a fault.
Method and attack files take what their `Params` are made of from here: Strict, Fit, Share, ...
"""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from robsparse.base import registry
from robsparse.base.errors import UsageError, nearest
from robsparse.schema.fields import Name, Radius, Share, Sparsity, Strict
from robsparse.schema.sections import (
    AttackParams,
    Crafting,
    Evaluation,
    Finetune,
    Fit,
    FromScratch,
    Grid,
    Machine,
    Objective,
    Selection,
    Table,
    Threat,
    Training,
)
from robsparse.study import checks, faults
from robsparse.study.study import Study

__all__ = [
    "AttackParams",
    "Crafting",
    "Evaluation",
    "Finetune",
    "Fit",
    "FromScratch",
    "Grid",
    "Machine",
    "Objective",
    "Radius",
    "Selection",
    "Share",
    "Sparsity",
    "Strict",
    "Study",
    "Table",
    "Threat",
    "Training",
    "load",
]


_VARIANT_OF_METHOD = {
    "starts_from": (
        Name | None,
        Field(None, description="the variant whose networks it starts from, if not the plain one"),
    )
}


def load(path: str | Path) -> Study:
    """Read and validate a study.

    Raises UsageError naming file, key, value, what was expected and the nearest match.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=faults.Loader)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the config ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return of_data(data, str(path))


def of_data(data: Any, path: str) -> Study:
    """Validate a study that is already read; `path` is what faults are said to be in.

    Raises UsageError as `load` does.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    try:
        return _fill_in(Study.model_validate(data), data)
    except ValidationError as error:
        raise UsageError(
            "\n".join(f"{path}: {line}" for line in faults.lines(error, data))
        ) from None
    except UsageError as error:
        lines = str(error).splitlines()
        raise UsageError("\n".join(f"{path}: {line}" for line in lines)) from None


def _fill_in(study: Study, data: dict[str, Any]) -> Study:
    """Replace the mappings of named parts by their validated models, defaults filled in."""
    several = isinstance(data.get("grid"), list)
    everywhere = {
        name: [value for block in study.grid for value in getattr(block, name)]
        for name in ("datasets", "archs", "methods")
    }
    everywhere["datasets"] += [model.dataset for model in study.models.values()]
    everywhere["archs"] += [model.arch for model in study.models.values() if model.arch]
    methods = _parts("method", everywhere["methods"], study.methods, "grid.methods", "methods")
    filled = study.model_copy(update={"methods": methods})
    _check_models(filled)
    _check_starts(filled)
    starts = {filled.start_method(name) for name in methods} - {None}
    # Clean accuracy is always measured: attacks see only what is classified correctly.
    chosen = [name for names in study.evaluation.selections.values() for name in names]
    attacks = _parts(
        "attack",
        ["clean", *chosen],
        study.evaluation.attacks,
        "evaluation.selections",
        "evaluation.attacks",
    )
    study = study.model_copy(
        update={
            "datasets": _parts(
                "dataset", everywhere["datasets"], study.datasets, "grid.datasets", "datasets"
            ),
            "archs": _parts("arch", everywhere["archs"], study.archs, "grid.archs", "archs"),
            "methods": _parts(
                "method",
                [*everywhere["methods"], *sorted(starts)],
                study.methods,
                "grid.methods",
                "methods",
            ),
            "evaluation": study.evaluation.model_copy(update={"attacks": attacks}),
            "grid": [
                _fill_in_block(study, block, data, f"grid.{i}" if several else "grid")
                for i, block in enumerate(study.grid)
            ],
        }
    )
    if found := checks.faults(study):
        raise UsageError("\n".join(found))
    if not study.planned:
        left_out = "every block is left out, because its where_exists is missing"
        raise UsageError(f"grid: {left_out if study.grid else 'expected a block, or models'}")
    return study


def _fill_in_block(study: Study, block: Grid, data: dict[str, Any], key: str) -> Grid:
    """Validate the block's own settings, merged over those of the sections."""
    training = _training_of_block(block, data, f"{key}.training")
    params, key = {}, f"{key}.params"
    for name in block.params:
        if name not in [*block.methods, *study.methods]:
            raise UsageError(
                f"{key}.{name}: expected a method of the block{nearest(name, block.methods)}"
            )
    for name, values in block.params.items():
        shared = study.methods.get(name) or {}
        if not isinstance(values, dict) or not isinstance(shared, dict):
            raise UsageError(
                f"{key}.{name} = {faults.show(values)}: expected a mapping of hyperparameters"
            )
        merged = {name: _merge(shared, values)}
        params |= _parts("method", [name], merged, key, key)
    return block.model_copy(update={"params": params, "training": training})


def _training_of_block(block: Grid, data: dict[str, Any], key: str) -> Training | None:
    if not block.training:
        return None
    if not isinstance(block.training, dict):
        raise UsageError(f"{key} = {faults.show(block.training)}: expected a mapping of settings")
    merged = _merge(data["training"], block.training)
    try:
        return Training.model_validate(merged)
    except ValidationError as error:
        raise UsageError("\n".join(faults.lines(error, merged, key))) from None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _check_models(study: Study) -> None:
    """Refuse a network from elsewhere that has another's name or no weights."""
    for name, model in study.models.items():
        if name in {*study.methods, *registry.names("method")}:
            raise UsageError(f"models.{name}: expected a name that is no method's")
        for kind, own in (("dataset", model.dataset), ("arch", model.arch)):
            known = {*registry.names(kind), *getattr(study, f"{kind}s")}
            if own is not None and own not in known:
                raise UsageError(
                    f"models.{name}.{kind} = {faults.show(own)}: unknown {kind}, expected one of: "
                    f"{', '.join(sorted(known))}{nearest(own, known)}"
                )
        if model.file is not None and not os.path.isfile(model.file):
            raise UsageError(f"models.{name}.file = {faults.show(model.file)}: no such file")


def _check_starts(study: Study) -> None:
    """Refuse a variant that starts from what its method cannot start from."""
    for name, params in study.methods.items():
        own = getattr(params, "starts_from", None)
        if own is None:
            continue
        wanted = study.entry("method", name).literals.get("STARTS_FROM")
        choices = [n for n in study.methods if study.base("method", n) == wanted]
        if own not in choices:
            raise UsageError(
                f"methods.{name}.starts_from = {faults.show(own)}: expected "
                f"{', '.join(choices) or 'nothing'}{nearest(own, choices)}"
            )


def _parts(kind: str, wanted: Any, given: dict[str, Any], grid_key: str, key: str) -> dict:
    variants = {
        name: values["base"]
        for name, values in given.items()
        if isinstance(values, dict) and isinstance(values.get("base"), str)
    }
    parts = {}
    for name in dict.fromkeys([*given, *wanted]):
        model = _model(kind, name, variants, key if name in given else grid_key, key)
        values = {} if given.get(name) is None else given[name]
        try:
            parts[name] = model.model_validate(values)
        except ValidationError as error:
            raise UsageError("\n".join(faults.lines(error, values, f"{key}.{name}"))) from None
        except Exception as error:  # a validator of a file of somebody's own
            said = registry.entry(kind, variants.get(name, name)).blame(error)
            raise UsageError(f"{key}.{name}: {said}") from error
    return {name: parts[name] for name in dict.fromkeys([*wanted, *given])}


def _model(
    kind: str, name: str, variants: dict[str, str], named_in: str, key: str
) -> type[BaseModel]:
    """The parameters of a registered part, or of a variant of one."""
    if name not in variants:
        return _entry(kind, name, named_in, variants).params
    if name in registry.names(kind):
        raise UsageError(
            f"{key}.{name}: expected another name for a variant, that is no registered {kind}"
        )
    params = _entry(kind, variants[name], f"{key}.{name}.base", {}).params
    return create_model(
        "Params",
        __base__=params,
        base=(str, Field(description="the registered part that this is a variant of")),
        label=(str, Field(name, description="printed name")),
        **(_VARIANT_OF_METHOD if kind == "method" else {}),
    )


def _entry(kind: str, name: str, key: str, variants: dict[str, str]) -> registry.Entry:
    try:
        return registry.entry(kind, name, also=variants)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
