"""From a failed validation to one line that a person can act on."""

import json
from collections.abc import Hashable
from typing import Any

import yaml
from pydantic import ValidationError

from robsparse.base.errors import cut, nearest

DEEPEST = 32  # levels of a config
MOST = 100_000  # values of a config
LONGEST = 4096  # bits of a whole number
_DEEP = f"expected at most {DEEPEST} levels of nesting"


def lines(error: ValidationError, data: Any, prefix: str = "") -> list[str]:
    """Each fault of a validation as `key = value: what was expected; nearest match`."""
    return [_line(fault, data, prefix) for fault in error.errors(include_url=False)]


def _line(fault: Any, data: Any, prefix: str) -> str:
    """One fault as "key = value: what was expected"."""
    context = fault.get("ctx") or {}
    location = _without_lone_index(data, [part for part in fault["loc"] if part != "[key]"])
    if "key" in context:
        location.append(context["key"])
    key = ".".join(cut(str(part)) for part in ([prefix] if prefix else []) + location)
    if fault["type"] == "missing":
        return f"{key}: missing, expected a value"
    value = _look_up(data, location, fault["input"])
    message = fault["msg"].replace("Input should be", "expected to be")
    message = message.removeprefix("Value error, ")
    if fault["type"] == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        message = f"expected {context['expected']}{nearest(value, choices)}"
    for bound in ("ge", "gt", "le", "lt"):
        if bound in context:
            message += f"; nearest match: {context[bound]}" if bound in ("ge", "le") else ""
    if fault["type"] == "greater_than" and isinstance(context["gt"], int):
        message += f"; nearest match: {context['gt'] + 1}"
    if fault["type"] == "too_short":
        message = "expected at least one entry"
    named_wrongly = "[key]" in fault["loc"]
    return f"{key}: {message}" if named_wrongly else f"{key} = {show(value)}: {message}"


def _without_lone_index(data: Any, location: list) -> list:
    """Leave out the 0 of a mapping that stands where a list of one is meant."""
    kept = []
    for part in location:
        if isinstance(part, int) and isinstance(data, dict):
            continue
        kept.append(part)
        data = _look_up(data, [part], None)
    return kept


def show(value: Any) -> str:
    """A value as it stands in YAML, cut to a readable length."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):  # dates as keys, an anchor that contains itself
        text = repr(value)
    return cut(text)


def _look_up(data: Any, location: list, default: Any) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return default
    return data


class Loader(yaml.SafeLoader):
    """YAML as a study is written in: what it would take silently, or fail at, is one line.

    Of two equal keys YAML keeps the last; nesting, numbers and aliases of any size are let through.
    """

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.levels += 1
        if self.levels > DEEPEST:
            raise yaml.composer.ComposerError(None, None, _DEEP, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The whole file, if it is not too large with every alias written out."""
        whole = super().get_single_node()
        left, seen = [(whole, 0)] if whole else [], 0
        while left:
            node, level = left.pop()
            seen += 1
            if level > DEEPEST:
                raise yaml.composer.ComposerError(None, None, _DEEP, node.start_mark)
            if seen > MOST:
                raise yaml.composer.ComposerError(
                    None, None, f"expected at most {MOST} values, aliases written out", None
                )
            if isinstance(node, yaml.CollectionNode):
                parts = node.value
                if isinstance(node, yaml.MappingNode):
                    parts = [part for pair in parts for part in pair]
                left += [(part, level + 1) for part in parts]
        return whole

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > LONGEST:
                raise OverflowError
        except yaml.YAMLError:
            raise
        except Exception:  # 2020-13-45, a number of 5,000 digits, !!int of a word, ...
            kind = node.tag.rsplit(":", 1)[-1]
            said = f"{show(node.value)} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from None
        if isinstance(value, str) and not value.isprintable():
            said = f"{show(value)}: expected text of one line without control characters"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):  # !!map of a word: let it say so
            return super().construct_mapping(node, deep)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # what `<<` brings in may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected a word as key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {show(key)} stands twice", key_node.start_mark
                )
            seen.add(key)
        self.flatten_mapping(node)
        return super().construct_mapping(node, deep)
