"""Writes the reference page of all keys of a study file from the JSON schema. Imports no torch."""

import ast
import json

from robsparse.base import registry
from robsparse.schema import json_schema
from robsparse.schema.json_schema import REFERENCE, SECTIONS, Schema

_TITLES = {
    "dataset": "Data sets",
    "arch": "Architectures",
    "method": "Methods",
    "attack": "Attacks",
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false"}
_WORDS |= {"string": "text", "null": "null", "object": "mapping", "array": "list"}
_HEAD = """# Every key of a study file

`robsparse schema --write` writes this page and `config/schema.json` from the code; do not edit it.
`robsparse check CONFIG` checks a file. Editors with a YAML language server complete keys and mark
wrong values: the first line of each file in `config/` names the schema.

**Bold** keys are needed. Paths are relative to the folder in which a command runs. Sections with
named parts (datasets, archs, methods, evaluation.attacks) list only parts whose values differ from
the defaults. A new name there defines a variant: `{base: NAME, label: TEXT, values...}`.
"""


def page() -> str:
    """Return the page as Markdown."""
    schema = json_schema.build()
    models = schema["$defs"]
    parts = {f"{kind} {name}" for kind in SECTIONS.values() for name in registry.names(kind)}
    lines = [_HEAD, "## The file", "", *_table(schema, models)]
    for name, model in models.items():
        if name not in parts:
            lines += ["", f"## {name}", "", *_about(model), *_table(model, models)]
    for path, kind in SECTIONS.items():
        lines += ["", f"## {_TITLES[kind]}", "", f"Parts of the section `{'.'.join(path)}`."]
        for name in registry.names(kind):
            if model := models.get(f"{kind} {name}"):
                head = ["", f"### {name}", "", _first_sentence(kind, name), ""]
                lines += [*head, *_about(model), *_table(model, models)]
    return "\n".join(lines).rstrip() + "\n"


def _first_sentence(kind: str, name: str) -> str:
    text = ast.get_docstring(registry.entry(kind, name).tree) or ""
    return _escaped(text.split("\n\n")[0])


def _about(model: Schema) -> list[str]:
    """The docstring of a model, with an empty line after it."""
    text = model.get("description", "")
    return [_escaped_lines(text), ""] if text else []


def _table(model: Schema, models: Schema) -> list[str]:
    """The keys of a model, one row each."""
    rows = []
    for key, own in model.get("properties", {}).items():
        needed = key in model.get("required", [])
        cells = (
            f"**`{key}`**" if needed else f"`{key}`",
            _type(own),
            _default(own, models),
            _escaped(own.get("description", "")),
        )
        rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return ["No keys."]
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows]


def _default(own: Schema, models: Schema) -> str:
    """The default of a key; of a model, only the values that differ from its own defaults."""
    default = own.get("default", {})
    if "$ref" in own and isinstance(default, dict):
        keys = models[own["$ref"].removeprefix(REFERENCE)]["properties"]
        default = {key: v for key, v in default.items() if v != keys[key].get("default")}
    return f"`{json.dumps(default)}`" if default != {} else ""


def _type(own: Schema) -> str:
    """What a value may be, in words."""
    if "$ref" in own:
        return _link(own["$ref"].removeprefix(REFERENCE))
    if "anyOf" in own:
        return " or ".join(dict.fromkeys(map(_type, own["anyOf"])))
    if choices := own.get("enum", [own["const"]] if "const" in own else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    return _of_kind(str(own.get("type", "any value")), own)


def _of_kind(kind: str, own: Schema) -> str:
    if kind == "array":
        return f"list of {_item(own.get('items', {}))}"
    if kind == "object" and "properties" in own:
        return "parts by name"
    if kind == "object" and isinstance(own.get("additionalProperties"), dict):
        return f"mapping of names to {_item(own['additionalProperties'])}"
    if "pattern" in own:
        return f"text like {own['examples'][0]}"
    bounds = [f"{sign} {own[key]}" for key, sign in _BOUNDS.items() if key in own]
    return " ".join([_WORDS.get(kind, kind), *([" and ".join(bounds)] if bounds else [])])


def _item(own: Schema) -> str:
    """What an entry of a list or a mapping may be; the name of a part has a description."""
    return str(own["description"]) if "anyOf" in own and "description" in own else _type(own)


def _link(name: str) -> str:
    """A link to the heading of a model, with the anchor that GitHub and MyST give it."""
    return f"[{name}](#{name.lower().replace(' ', '-')})"


def _escaped(text: str) -> str:
    """A text in one line, in which Markdown reads no table and no HTML."""
    return " ".join(_escaped_lines(text).split())


def _escaped_lines(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")
