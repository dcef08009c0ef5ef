"""Writes the file of a new method from the template."""

import ast
import re

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import write_text


def new_method(name: str, label: str | None = None) -> str:
    """Copy baselines/template.py to NAME.py in the same folder; return text on the next steps.

    Args:
        name: name of the file and of the method in configs.
        label: name in tables and plots; None derives it from `name`.

    Raises:
        UsageError: if the name is not allowed, or if a method already has it.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(
            f"'{name}': expected lower-case letters, digits and _, with a letter first"
        )
    template = registry.entry("method", "template")
    path = template.path.with_name(f"{name}.py")
    if name in registry.names("method") or path.exists():
        raise UsageError(f"'{name}': this method already exists; expected another name")
    printed = label or name.replace("_", " ").capitalize()
    write_text(path, _filled_in(template.path.read_text(), name, printed))
    return (
        f"written: {path}\n"
        f"next: fill in its hooks, add '{name}' to grid.methods of a config, then\n"
        f"  robsparse check CONFIG && robsparse run CONFIG --cores 2\n"
        f"  python -m pytest tests/contract/test_methods.py -k {name}"
    )


def _filled_in(text: str, name: str, label: str) -> str:
    old = ast.get_docstring(ast.parse(text), clean=False) or ""
    new = (
        f"{_escaped(label)}: what it does, in one sentence.\n\n"
        "Source: the paper (authors, venue, equation) or the repository of the method.\n"
    )
    camel = "".join(part.capitalize() for part in name.split("_"))
    text = text.replace(old, new, 1).replace("TemplateStage", f"{camel}Stage")
    return re.sub(r'^LABEL = ".*"$', lambda _: f"LABEL = {_quoted(label)}", text, flags=re.M)


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    """Escape a text for a Python string in double quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"')
