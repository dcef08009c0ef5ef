"""Loads a study: reads, checks and resolves its YAML file. Imports no torch.

YAML is read with PyYAML. ruamel.yaml refuses duplicate keys without code of ours. But it is half as
fast, it reads some values of YAML 1.1 differently (yes, 010, 1:30), and this module would still
have to check sizes, nesting, dates and numbers.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from robsparse.base.errors import UsageError
from robsparse.schema.study_file import StudyFile
from robsparse.study import checks, messages
from robsparse.study.cells import Cell
from robsparse.study.resolving import resolved
from robsparse.study.study import Study

DEEPEST = 32  # levels of nesting in a file
MOST = 100_000  # values in a file
LONGEST = 4096  # bits in a whole number
_DEEP = f"expected at most {DEEPEST} levels of nesting"
_MERGE = "tag:yaml.org,2002:merge"


def load(path: str | Path, whole: bool = True) -> Study:
    """Read and validate a study.

    Args:
        path: the config file.
        whole: whether to resolve and check all networks and tables. A job on one network needs only
            that network; it calls `check_cell`.

    Raises:
        UsageError: one line for each error: file, key, value, what was expected, nearest match.
    """
    return validate(read(Path(path)), str(path), whole)


def check_cell(study: Study, cell: Cell, path: str | Path) -> None:
    """Check one network of a study that was not loaded whole.

    Raises:
        UsageError: as `load`.
    """
    with _naming(str(path)):
        if errors := checks.errors_in_cells(study, [cell]):
            raise UsageError("\n".join(errors))


def validate(data: Any, path: str, whole: bool = True) -> Study:
    """Validate the content of a config file. Messages name `path` as the file.

    Raises:
        UsageError: as `load`.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    with _naming(path):
        try:
            file = StudyFile.model_validate(data)
        except ValidationError as error:
            raise UsageError("\n".join(messages.lines(error, data))) from None
        return resolved(file, in_list=isinstance(data.get("grid"), list), whole=whole)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the path of the config before each line of a UsageError."""
    try:
        yield
    except UsageError as error:
        lines = str(error).splitlines()
        raise UsageError("\n".join(f"{path}: {line}" for line in lines)) from None


def read(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UsageError: in one line with the position in the file, if the file cannot be read, is not
            YAML, has a duplicate key in a mapping, or has a value that no config needs. Such values
            are more than DEEPEST levels, more than MOST values (aliases expanded), numbers of more
            than LONGEST bits, invalid dates, and control characters.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the config ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    try:
        loader = yaml.SafeLoader(text)
        return _checked(loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _checked(loader: yaml.SafeLoader) -> Any:
    """The content of the only document, after a check of all its nodes."""
    try:
        whole = loader.get_single_node()
    except RecursionError:
        raise _error(_DEEP, loader.get_mark()) from None
    left, seen = [(whole, 1)] if whole else [], 0
    while left:
        node, level = left.pop()
        seen += 1
        if level > DEEPEST:
            raise _error(_DEEP, node.start_mark)
        if seen > MOST:
            raise _error(f"expected at most {MOST} values with aliases expanded", node.start_mark)
        if isinstance(node, yaml.MappingNode):
            _check_keys(loader, node)
            left += [(part, level + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += [(part, level + 1) for part in node.value]
        elif isinstance(node, yaml.ScalarNode):
            _value(loader, node)
    return loader.construct_document(whole) if whole else None


def _check_keys(loader: yaml.SafeLoader, node: yaml.MappingNode) -> None:
    """Refuse a duplicate key. A key may override one that a merge key (`<<`) adds."""
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = _value(loader, key_node) if isinstance(key_node, yaml.ScalarNode) else []
        if not isinstance(key, Hashable):
            raise _error("expected a word as key", key_node.start_mark)
        if key in seen and key_node.tag != _MERGE:
            raise _error(f"the key {messages.show(key)} appears twice", key_node.start_mark)
        seen.add(key)


def _value(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    """A single value. Invalid values, huge numbers and control characters are errors."""
    try:
        value = loader.construct_object(node) if node.tag != _MERGE else node.value
        if isinstance(value, int) and value.bit_length() > LONGEST:
            raise OverflowError
    except yaml.YAMLError:
        raise
    except Exception:  # 2020-13-45, a number of 5,000 digits, !!int of a word, ...
        kind = node.tag.rsplit(":", 1)[-1]
        raise _error(
            f"{messages.show(node.value)} cannot be read as {kind}", node.start_mark
        ) from None
    if isinstance(value, str) and not value.isprintable():
        expected = "expected text of one line without control characters"
        raise _error(f"{messages.show(value)}: {expected}", node.start_mark)
    return value


def _error(message: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)
