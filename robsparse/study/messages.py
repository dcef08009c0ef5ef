"""Makes messages about a config from the errors of a failed validation."""

import json
from typing import Any

from pydantic import ValidationError

from robsparse.base.errors import nearest_match, shortened


def lines(error: ValidationError, data: Any, prefix: str = "") -> list[str]:
    """One line for each error: `key = value: what was expected; nearest match`."""
    return [_line(one, data, prefix) for one in error.errors(include_url=False)]


def _line(error: Any, data: Any, prefix: str) -> str:
    """One error as a line."""
    context = error.get("ctx") or {}
    location = _without_lone_index(data, [part for part in error["loc"] if part != "[key]"])
    if "key" in context:
        location.append(context["key"])
    key = ".".join(shortened(str(part)) for part in ([prefix] if prefix else []) + location)
    if error["type"] == "missing":
        return f"{key}: missing, expected a value"
    value = _look_up(data, location, error["input"])
    message = error["msg"].replace("Input should be", "expected to be")
    message = message.removeprefix("Value error, ")
    if error["type"] == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        message = f"expected {context['expected']}{nearest_match(value, choices)}"
    for bound in ("ge", "gt", "le", "lt"):
        if bound in context:
            message += f"; nearest match: {context[bound]}" if bound in ("ge", "le") else ""
    if error["type"] == "greater_than" and isinstance(context["gt"], int):
        message += f"; nearest match: {context['gt'] + 1}"
    if error["type"] == "too_short":
        message = "expected at least one entry"
    named_wrongly = "[key]" in error["loc"]
    return f"{key}: {message}" if named_wrongly else f"{key} = {show(value)}: {message}"


def _without_lone_index(data: Any, location: list[int | str]) -> list[int | str]:
    """The location without the index 0 that was added for a mapping in place of a list."""
    kept = []
    for part in location:
        if isinstance(part, int) and isinstance(data, dict):
            continue
        kept.append(part)
        data = _look_up(data, [part], None)
    return kept


def show(value: Any) -> str:
    """A value as text, like in YAML, shortened to a readable length."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):  # dates as keys, an anchor that contains itself
        text = repr(value)
    return shortened(text)


def _look_up(data: Any, location: list[int | str], default: Any) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return default
    return data
