"""The JSON schema of a study file: for editors, and for the page docs/config.md.

Editors complete keys and mark wrong values with it. `robsparse check` finds more: values that are
only wrong together. Imports no torch.
"""

from collections.abc import Callable, Iterable
from typing import Any

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.schema.study_file import StudyFile

Schema = dict[str, Any]

# The sections with named parts: their path in the file, and the kind of their parts.
SECTIONS = {
    ("datasets",): "dataset",
    ("archs",): "arch",
    ("methods",): "method",
    ("evaluation", "attacks"): "attack",
}
REFERENCE = "#/$defs/"
_NOUNS = {
    "dataset": "a data set",
    "arch": "an architecture",
    "method": "a method",
    "attack": "an attack",
}


def build() -> Schema:
    """Return the schema. Parts that are registered by other packages are included."""
    schema = StudyFile.model_json_schema()
    shared: Schema = schema["$defs"]
    for kind in SECTIONS.values():
        for name in _names(kind):
            shared[f"{kind} {name}"] = _part(kind, name, shared)
    properties, grid = schema["properties"], shared["Grid"]["properties"]
    for path, kind in SECTIONS.items():
        place = properties if len(path) == 1 else shared["EvaluationSection"]["properties"]
        place[path[-1]] = _section(kind, place[path[-1]].get("description"))
    for kind in ("dataset", "arch", "method"):
        grid[f"{kind}s"]["items"] = _name_of(kind)
    selections = shared["EvaluationSection"]["properties"]["selections"]
    selections["additionalProperties"]["items"] = _name_of("attack")
    grid["params"] = _section("method", grid["params"]["description"])
    grid["params"]["additionalProperties"] = {"type": "object"}
    grid["training"] = _partial(shared["Training"], shared) | grid["training"]
    one = {"$ref": f"{REFERENCE}Grid"}
    properties["grid"] |= {"anyOf": [one, {"type": "array", "items": one}]}
    for key in ("type", "items"):
        del properties["grid"][key]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _without_titles(schema)


def _names(kind: str) -> list[str]:
    """The names of a kind whose files are not damaged."""
    return [name for name in registry.names(kind) if _is_readable(kind, name)]


def _is_readable(kind: str, name: str) -> bool:
    try:
        registry.entry(kind, name)
    except UsageError:
        return False
    return True


def _part(kind: str, name: str, shared: Schema) -> Schema:
    """The schema of the parameters of one part. Models inside it are added to `shared`."""
    schema = registry.entry(kind, name).params.model_json_schema()
    for inner, own in schema.pop("$defs", {}).items():
        if shared.setdefault(inner, own) != own:  # another model has this name
            renamed = f"{inner} of {kind} {name}"
            shared[renamed] = own
            schema = _replaced(schema, REFERENCE + inner, REFERENCE + renamed)
    return schema | {"type": ["object", "null"]}  # `minimum_norm:` without a value is allowed


def _section(kind: str, description: str | None) -> Schema:
    """The schema of a section: parts by registered name, and variants with a `base`."""
    names = _names(kind)
    schema: Schema = {
        "type": "object",
        "default": {},
        "properties": {name: {"$ref": f"{REFERENCE}{kind} {name}"} for name in names},
        "additionalProperties": {
            "type": "object",
            "required": ["base"],
            "properties": {
                "base": {"enum": names, "description": f"{_NOUNS[kind]}; this is a variant of it"},
                "label": {"type": "string", "description": "printed name"},
            },
        },
    }
    return schema | ({"description": description} if description else {})


def _name_of(kind: str) -> Schema:
    """A registered name, or the name of a variant."""
    return {
        "description": f"name of {_NOUNS[kind]}",
        "anyOf": [{"enum": _names(kind)}, {"type": "string"}],
    }


def _partial(schema: Schema, shared: Schema) -> Schema:
    """A copy of a schema in which no key is required, at any depth: a block has some of them."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict) and set(value) >= {"$ref"}:
            return {**shared[value["$ref"].removeprefix(REFERENCE)], **_without(value, ["$ref"])}
        return value

    def strip(value: Any) -> Any:
        value = resolve(value)
        return _without(value, ["required"]) if isinstance(value, dict) else value

    return _mapped(schema, strip)


def _replaced(schema: Schema, old: str, new: str) -> Schema:
    """A copy of a schema with another reference."""
    return _mapped(schema, lambda value: new if value == old else value)


def _without_titles(schema: Schema) -> Schema:
    """A copy without the titles that pydantic derives from the names of keys."""

    def strip(value: Any) -> Any:
        titled = isinstance(value, dict) and isinstance(value.get("title"), str)
        return _without(value, ["title"]) if titled else value

    return _mapped(schema, strip)


def _without(schema: Schema, keys: Iterable[str]) -> Schema:
    return {key: value for key, value in schema.items() if key not in keys}


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a JSON value with `change` applied to each value, from outside to inside."""
    value = change(value)
    if isinstance(value, dict):
        return {key: _mapped(own, change) for key, own in value.items()}
    return [_mapped(own, change) for own in value] if isinstance(value, list) else value
