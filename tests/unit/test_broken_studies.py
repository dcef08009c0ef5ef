"""Random errors in all settings of a study give one line for each error, and no traceback."""

import contextlib
import copy
import io
import os
import re

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robsparse.base.errors import UsageError
from robsparse.cli.main import main
from robsparse.schema.study_file import StudyFile
from robsparse.study import loading

EXAMPLES = int(os.environ.get("ROBSPARSE_BROKEN_STUDIES", "300"))
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 7, 255, 10**6, 10**12, 10**400, -(10**400)),
    *(0.5, -0.5, 1.5, 1e-300, 1e300, -1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "a", "A", "bcs", "BCS", "main", "reference", "n" * 10_000, "x\ny", "a\0b", "é"),
    *("../..", "/", "/dev/null", "$(id)", "`id`", "x; id", "-rf", "%s{0}{key}", "8/255", "1/0"),
    *("0.5/255", "-1/3", "nan", "1e400", "5" * 5000, "1_0", "2020-01-01", "\ud83d", "\u2028"),
    *([], [None], [1, 1], ["a"], [["a"]], [{}], ["clean"] * 2, list(range(300))),
    *({}, {"a": 1}, {"base": "bcs"}, {"base": 3}, {"base": None, "label": 3}, {1: 2}, {None: {}}),
    *({"n" * 10_000: {}}, {"x\ny": {"base": "bcs"}}, {"epochs": 10**18}, {"": 1}),
    [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]],
]

JUNK = st.sampled_from(VALUES).map(copy.deepcopy)


def everything(tiny, folder):
    """A valid study with every section and with all defaults."""
    data = copy.deepcopy(tiny)
    np.savez(folder / "a.npz", train_images=np.zeros((40, 8, 8), np.uint8))
    block = data["grid"] | {
        "sparsities": [0.99],
        "methods": ["quiet"],
        "training": {"eps": 0.1, "crafting": {"step_size": 0.05, "eps_warmup": 1}},
        "params": {"quiet": {"train": {"epochs": 9, "warmup": 2}}},
        "budget": {"unit": "epochs", "total": 12},
    }
    data["methods"]["quiet"] = {"base": "bcs", "label": "Quiet"}
    data["grid"] = [data["grid"], block]
    (folder / "w.pt").touch()
    model = {"file": str(folder / "w.pt"), "arch": "small_cnn", "dataset": "digits"}
    data["models"] = {"theirs": model | {"objective": "at", "mean": [0.5], "std": [0.5]}}
    table = {"name": "mine", "title": "Mine", "rows": ["sparsity", "method"], "columns": ["arch"]}
    data["tables"] = [table | {"attacks": ["clean"]}]
    data["evaluation"]["attacks"]["transfer"] = {"surrogate": "dense"}
    return data


def filled_in(data, folder):
    """The study with all defaults, so that every key can be broken."""
    path = folder / "whole.yaml"
    path.write_text(yaml.safe_dump(data))
    whole = loading.load(path).settings()
    for block in whole["grid"]:
        block["training"] = block["training"] or {}
    whole["models"] = data["models"]
    return whole


def places(data, path=()):
    """The path of every key and index in nested data."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@st.composite
def broken(draw, whole):
    """A study with one to three errors."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(data))
        if not known:
            break
        *parents, last = draw(st.sampled_from(known))
        parent = data
        for key in parents:
            parent = parent[key]
        what = draw(st.sampled_from(["junk", "junk", "junk", "remove", "rename", "add", "swap"]))
        if what == "junk":
            parent[last] = draw(JUNK)
        elif what == "remove":
            del parent[last]
        elif what == "swap":  # what is right elsewhere
            *there, key = draw(st.sampled_from(known))
            value = whole_at(data, [*there, key])
            parent[last] = copy.deepcopy(value)
        elif isinstance(parent, dict):
            key = draw(st.sampled_from(["a", f"{last}s", str(last).upper(), 3, "n" * 200, "é", ""]))
            parent[key] = parent.pop(last) if what == "rename" else draw(JUNK)
        else:
            parent.append(draw(JUNK))
    return data


@st.composite
def garbled(draw, whole):
    """The text of a broken study, sometimes also with a YAML error."""
    text = yaml.safe_dump(draw(broken(whole)), sort_keys=False)
    if draw(st.booleans()):
        return text
    at = draw(st.integers(0, len(text) - 1))
    piece = draw(st.sampled_from(["", "\t", ": ", "- ", "[", "}", "&a ", "*a ", "!!int ", "\n"]))
    return text[:at] + piece + text[at + draw(st.integers(0, 30)) :]


def whole_at(data, path):
    for key in path:
        data = data[key]
    return data


def check(path):
    """Exit code and lines on stderr of `robsparse check`."""
    message = io.StringIO()
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
        code = main(["check", str(path)])
    return code, message.getvalue().split("\n")[:-1]


KEY = re.compile(
    rf"({'|'.join(StudyFile.model_fields)})\b|.* = .*: unknown key, |not valid YAML: |.*\.py"
)


def test_the_unbroken_study_is_valid(tiny, tmp_path):
    whole = filled_in(everything(tiny, tmp_path), tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(whole))
    assert check(path) == (0, [])
    assert len(list(places(whole))) > 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("broken")


@pytest.fixture(scope="module")
def whole(repository, folder):
    tiny = yaml.safe_load((repository / "config" / "tiny.yaml").read_text())
    return filled_in(everything(tiny, folder), folder)


def assert_plain(lines, start):
    """Check that each line names a key and an error, and that it is printable."""
    for line in lines:
        assert line.startswith(start), line
        assert KEY.match(line.removeprefix(start)), line
        assert len(line) < 800
        assert line.isprintable(), line


def in_one_line(value):
    """Whether YAML accepts all texts."""
    if isinstance(value, dict):
        return all(in_one_line(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(in_one_line, value))
    return not isinstance(value, str) or value.isprintable()


def test_errors_in_data_are_lines_that_name_a_key(whole):
    """Set ROBSPARSE_BROKEN_STUDIES to test more studies."""
    refused = []

    @settings(max_examples=EXAMPLES)
    @given(broken(whole).filter(in_one_line))
    def look(data):
        try:
            loading.validate(data, "study")
            refused.append(False)
        except UsageError as error:
            refused.append(True)
            assert_plain(str(error).split("\n"), "study: ")

    look()
    assert len(refused) >= EXAMPLES
    assert sum(refused) > EXAMPLES / 2  # most of what is done breaks it


def test_errors_in_files_are_lines_that_name_a_key(whole, folder):
    """Runs the command, also on files with YAML errors."""
    codes, path = [], folder / "study.yaml"

    @settings(max_examples=EXAMPLES // 6)
    @given(garbled(whole))
    def look(text):
        path.write_text(text)
        code, lines = check(path)
        codes.append(code)
        assert code in (0, 2)
        assert bool(lines) == (code == 2)
        assert_plain(lines, f"robsparse: error: {path}: ")

    look()
    assert codes.count(2) > EXAMPLES / 12
