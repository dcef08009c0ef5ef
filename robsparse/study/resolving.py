"""Makes a Study from a StudyFile: fills in the parameters of all parts and resolves all cells.

Imports no torch.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from robsparse.base import registry
from robsparse.base.errors import UsageError, nearest_match
from robsparse.schema.evaluation import Evaluation
from robsparse.schema.fields import Name, Strict
from robsparse.schema.grid import Grid
from robsparse.schema.study_file import StudyFile
from robsparse.schema.training import Training
from robsparse.study import checks, messages
from robsparse.study.parts import Block, PartKind, Parts, base_of, start_of
from robsparse.study.planned import Plan, planned_attacks
from robsparse.study.study import Study

_VARIANT_OF_METHOD: dict[str, Any] = {
    "starts_from": (
        Name | None,
        Field(
            None, description="a variant of the method that it starts from, in place of the method"
        ),
    )
}


def resolved(file: StudyFile, in_list: bool, whole: bool) -> Study:
    """Resolve a study file.

    Args:
        file: the study file.
        in_list: whether its grid is a list of blocks; messages then contain the index of a block.
        whole: whether to resolve and check all cells.

    Raises:
        UsageError: one line for each error, with the key and what was expected.
    """
    parts = _parts_of(file, in_list)
    if errors := checks.errors_in_parts(parts):
        raise UsageError("\n".join(errors))
    # The networks can only be listed if all parts are valid.
    attacks = planned_attacks(parts.attack_params, parts.threat)
    study = Study(
        **{field.name: getattr(parts, field.name) for field in fields(Parts)},
        attacks=MappingProxyType(attacks),
        planned=Plan(parts, attacks),
    )
    if not whole:
        return study
    if errors := checks.errors_in_cells(study, study.cells()) or checks.errors_in_tables(study):
        raise UsageError("\n".join(errors))
    if not study.planned:
        left_out = "every block is left out, because its where_exists is missing"
        raise UsageError(f"grid: {left_out if study.grid else 'expected a block, or models'}")
    return study


def _parts_of(file: StudyFile, in_list: bool) -> Parts:
    methods = _methods(file)
    # Clean accuracy is always measured: attacks run only on correctly classified images.
    chosen = ["clean", *(name for s in file.evaluation.selections.values() for name in s)]
    given = file.evaluation.attacks
    attacks = _filled("attack", chosen, given, "evaluation.selections", "evaluation.attacks")
    datasets = [name for block in file.grid for name in block.datasets]
    datasets += [model.dataset for model in file.models.values()]
    archs = [name for block in file.grid for name in block.archs]
    archs += [model.arch for model in file.models.values() if model.arch]
    return Parts(
        study=file.study,
        title=file.title,
        small=file.small,
        datasets=_filled("dataset", datasets, file.datasets, "grid.datasets", "datasets"),
        archs=_filled("arch", archs, file.archs, "grid.archs", "archs"),
        methods=methods,
        models=MappingProxyType(file.models),
        threat=file.threat,
        training=file.training,
        evaluation=Evaluation.model_validate(file.evaluation.model_dump(exclude={"attacks"})),
        attack_params=attacks,
        machine=file.machine,
        tables=tuple(file.tables),
        grid=tuple(
            _block_of(file, block, methods, f"grid.{i}" if in_list else "grid")
            for i, block in enumerate(file.grid)
        ),
    )


def _methods(file: StudyFile) -> Mapping[str, Strict]:
    """The methods of the grid, the methods that they start from, and unused variants."""
    named = [name for block in file.grid for name in block.methods]
    methods = _filled("method", named, file.methods, "grid.methods", "methods")
    _check_models(file, methods)
    _check_starts(methods)
    starts = {start for name in methods if (start := start_of(methods, name))}
    return _filled("method", [*named, *sorted(starts)], file.methods, "grid.methods", "methods")


def _block_of(file: StudyFile, block: Grid, methods: Mapping[str, Strict], key: str) -> Block:
    """The block, with its settings merged over those of the sections."""
    training = _training_of_block(file, block, f"{key}.training")
    return Block(
        key=key,
        datasets=tuple(block.datasets),
        archs=tuple(block.archs),
        objectives=tuple(block.objectives),
        methods=tuple(block.methods),
        sparsities=tuple(block.sparsities),
        seeds=tuple(block.seeds),
        params=_params_of_block(block, methods, f"{key}.params"),
        training=training or file.training,
        own_training=training is not None,
        budget=block.budget,
        where_exists=block.where_exists,
        left_out=block.where_exists is not None and not os.path.exists(block.where_exists),
    )


def _params_of_block(block: Grid, methods: Mapping[str, Strict], key: str) -> Mapping[str, Strict]:
    for name in block.params:
        if name not in [*block.methods, *methods]:
            raise UsageError(
                f"{key}.{name}: expected a method of the block{nearest_match(name, block.methods)}"
            )
    params: dict[str, Strict] = {}
    for name, values in block.params.items():
        if not isinstance(values, dict):
            raise UsageError(
                f"{key}.{name} = {messages.show(values)}: expected a mapping of hyperparameters"
            )
        merged = _merge(_without_defaults(methods[name]), values)
        params |= _filled("method", [name], {name: merged}, key, key)
    return MappingProxyType(params)


def _training_of_block(file: StudyFile, block: Grid, key: str) -> Training | None:
    if not block.training:
        return None
    if not isinstance(block.training, dict):
        shown = messages.show(block.training)
        raise UsageError(f"{key} = {shown}: expected a mapping of settings")
    merged = _merge(_without_defaults(file.training), block.training)
    try:
        return Training.model_validate(merged)
    except ValidationError as error:
        raise UsageError("\n".join(messages.lines(error, merged, key))) from None


def _without_defaults(model: Strict) -> dict[str, Any]:
    """The settings that are in the file."""
    return model.model_dump(exclude_unset=True)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A mapping with the values of both; those of `above` override. Nested mappings are merged."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _check_models(file: StudyFile, methods: Mapping[str, Strict]) -> None:
    """Refuse an external model with the name of a method, an unknown part or no file."""
    for name, model in file.models.items():
        if name in {*methods, *registry.names("method")}:
            raise UsageError(f"models.{name}: expected a name that is not the name of a method")
        for kind, own, given in (
            ("dataset", model.dataset, file.datasets),
            ("arch", model.arch, file.archs),
        ):
            known = {*registry.names(kind), *given}
            if own is not None and own not in known:
                raise UsageError(
                    f"models.{name}.{kind} = {messages.show(own)}: unknown {kind}, expected one "
                    f"of: {', '.join(sorted(known))}{nearest_match(own, known)}"
                )
        if model.file is not None and not os.path.isfile(model.file):
            raise UsageError(f"models.{name}.file = {messages.show(model.file)}: no such file")


def _check_starts(methods: Mapping[str, Strict]) -> None:
    """Refuse a variant that starts from a method that its base cannot start from."""
    for name, params in methods.items():
        own = getattr(params, "starts_from", None)
        if own is None:
            continue
        wanted = registry.entry("method", base_of(methods, name)).literals.get("STARTS_FROM")
        choices = [other for other in methods if base_of(methods, other) == wanted]
        if own not in choices:
            raise UsageError(
                f"methods.{name}.starts_from = {messages.show(own)}: expected "
                f"{', '.join(choices) or 'nothing'}{nearest_match(own, choices)}"
            )


def _filled(
    kind: PartKind, wanted: Iterable[str], given: Mapping[str, Any], grid_key: str, key: str
) -> Mapping[str, Any]:
    """The parameters of all parts of a kind; the wanted ones come first.

    Args:
        kind: kind of the parts.
        wanted: names that the grid or the evaluation uses.
        given: the section of the file: parameters by name.
        grid_key: name in messages of the place that uses the parts.
        key: name in messages of the section.
    """
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
            raise UsageError("\n".join(messages.lines(error, values, f"{key}.{name}"))) from None
        except Exception as error:  # a validator in a file of the user
            line = registry.entry(kind, variants.get(name, name)).describe_error(error)
            raise UsageError(f"{key}.{name}: {line}") from error
    return MappingProxyType({name: parts[name] for name in dict.fromkeys([*wanted, *given])})


def _model(
    kind: PartKind, name: str, variants: dict[str, str], named_in: str, key: str
) -> type[BaseModel]:
    """The parameters of a registered part, or of a variant of one."""
    if name not in variants:
        return _entry(kind, name, named_in, variants).params
    if name in registry.names(kind):
        raise UsageError(
            f"{key}.{name}: expected another name, because '{name}' is a registered {kind}"
        )
    params = _entry(kind, variants[name], f"{key}.{name}.base", {}).params
    return create_model(
        "Params",
        __base__=params,
        base=(str, Field(description="the registered part that this variant is based on")),
        label=(str, Field(name, description="printed name")),
        **(_VARIANT_OF_METHOD if kind == "method" else {}),
    )


def _entry(kind: PartKind, name: str, key: str, variants: dict[str, str]) -> registry.Entry:
    try:
        return registry.entry(kind, name, also=variants)
    except UsageError as error:
        raise UsageError(f"{key}: {error}") from None
