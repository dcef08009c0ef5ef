"""Names of a config are safe in paths and shell commands."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from robsparse.base.errors import UsageError
from robsparse.figures import plots_of, tables_of
from robsparse.study import loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.targets import Target

STUDY = {
    "study": "made_up",
    "title": "A title",
    "grid": {
        "datasets": ["digits", "other_digits"],
        "archs": ["small_cnn", "narrow"],
        "objectives": ["at"],
        "methods": ["lwm", "short"],
        "sparsities": [0.9],
        "seeds": [0],
        "where_exists": ".",
    },
    "datasets": {"other_digits": {"base": "digits", "label": "Others"}},
    "archs": {"narrow": {"base": "small_cnn", "width": 4}},
    "methods": {"short": {"base": "lwm", "label": "Short"}},
    "models": {
        "made": {"callable": "nets:build", "dataset": "digits", "objective": "at", "label": "Made"},
        "fetched": {"zoo": "Some_Net", "dataset": "digits", "objective": "at"},
        "given": {"file": __file__, "arch": "narrow", "dataset": "digits", "objective": "at"},
    },
    "threat": {"eps": "8/255"},
    "training": {"crafting": {"step_size": "2/255"}, "rst_file": "extra.npz"},
    "evaluation": {
        "n_examples": 10,
        "attacks": {"long_pgd": {"base": "pgd", "label": "Long"}},
        "selections": {"last": ["clean", "long_pgd"]},
    },
    "tables": [
        {
            "name": "short_table",
            "title": "A table",
            "datasets": ["digits"],
            "archs": ["narrow"],
            "methods": ["lwm"],
            "rows": ["sparsity"],
            "columns": ["method"],
            "attacks": ["long_pgd"],
            "selection": "last",
        }
    ],
}
SAFE = re.compile(r"[A-Za-z0-9_.-]+")
NASTY = [
    *("x; id", "$(id)", "`id`", "a&&b", "a|b", "a>b", "a'b", 'a"b', "a b", "a*b", "{wildcards}"),
    *("name\n", "na\nme", "na\0me", "\r", "../../x", "..", "a/../b", "/etc", "-x", "~", "", "\\"),
    *(
        "x" * 201,
        "\ud800",
        "\u2028",
        "%s",
        "name\n:build",
        "nets:build\n",
        "a.b:c;d",
    ),
    *("..:x", "nets:build;id", "Some_Net;id", "Some_Net/../x", ".Some"),
]


def texts(value, place=()):
    """Every text of the study, and every key that the user chooses."""
    if isinstance(value, str):
        yield place, "value"
    for key, below in enumerate(value) if isinstance(value, list) else ():
        yield from texts(below, (*place, key))
    for key, below in value.items() if isinstance(value, dict) else ():
        if place in (("datasets",), ("archs",), ("methods",), ("models",)):
            yield (*place, key), "key"
        yield from texts(below, (*place, key))


PLACES = sorted(texts(STUDY), key=str)


def with_text(place, part, text):
    """The study with one text replaced; a name is replaced in all places that use it."""
    data = copy.deepcopy(STUDY)
    *way, last = place
    inside = data
    for key in way:
        inside = inside[key]
    if part == "key":
        inside[text] = inside.pop(last)
        for block in (data["grid"], *data["tables"], *data["models"].values()):
            for key, value in block.items():
                if value == last:
                    block[key] = text
                elif isinstance(value, list):
                    block[key] = [text if one == last else one for one in value]
    else:
        inside[last] = text
    return data


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """loaded(data) returns the study and no errors, or None and the lines of the errors."""
    path = tmp_path_factory.mktemp("study") / "study.yaml"

    def load(data):
        path.write_text(yaml.safe_dump(data))
        try:
            return loading.load(path), []
        except UsageError as error:
            lines = str(error).split("\n")
            assert all(line.startswith(f"{path}: ") for line in lines)
            return None, lines

    return load


def parts_of_paths(study, root):
    """All parts, below `root`, of all paths that commands and rules make from a study."""
    layout = Layout(root / study.study)
    paths = [layout.root / name for name in (*tables_of(study), *plots_of(study))]
    for cell in study.cells():
        assert Cell.parse(cell.key) == cell
        paths += [layout.training(cell), layout.resume(cell), layout.failed(cell)]
        paths += [layout.model(cell, "last"), layout.flags(cell, "last")]
        source = study.source(cell.method)
        if source.foreign:
            paths += [Target.as_built(root, source, study.threat).record]
    return [part for path in paths for part in path.relative_to(root).parts]


def test_the_unchanged_study_is_valid(loaded):
    study, errors = loaded(STUDY)
    assert errors == []
    assert {cell.method for cell in study.cells()} >= {"lwm", "short", "made", "fetched", "given"}
    assert len(PLACES) > 30


@given(st.sampled_from(PLACES), st.sampled_from(NASTY) | st.text(max_size=12))
def test_a_text_is_refused_in_one_line_or_is_safe_in_a_path(loaded, place, text):
    study, _ = loaded(with_text(*place, text))
    for part in parts_of_paths(study, Path("results")) if study else ():
        assert SAFE.fullmatch(part)
        assert part not in (".", "..")
        assert not part.startswith(("-", "."))


NAMED = [
    place
    for place in PLACES
    if place[1] == "key"
    or place[0][-1] in ("study", "name", "zoo", "callable", "dataset", "arch")
    or place[0][:2] in (("grid", "datasets"), ("grid", "archs"), ("grid", "methods"))
]


@pytest.mark.parametrize("place", NAMED, ids=str)
def test_harmful_text_is_refused_as_a_name(place, loaded):
    for text in NASTY:
        assert loaded(with_text(*place, text))[1], text


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "a\u2028b", "\x1b[31m", "a\rb"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_texts_with_control_characters_are_refused(place, text, loaded):
    [line] = loaded(with_text(*place, text))[1]
    assert "expected text of one line without control characters" in line


def test_every_value_in_a_shell_command_of_a_rule_is_quoted(repository):
    commands = []
    for path in (repository / "Snakefile", *sorted((repository / "rules").glob("*.smk"))):
        for block in re.findall(r"\bshell[:(]\s*\n((?:\s+\".*\"\n)+)", path.read_text()):
            commands += re.findall(r"\{(.*?)\}", block)
    assert len(commands) >= 9
    unquoted = [name for name in commands if not name.endswith(":q")]
    assert set(unquoted) == {"threads"}


@pytest.mark.parametrize(
    ("sparsity", "hint"), [(0.99995, "0.9999"), (0.999999, "0.9999"), (0.98765, "0.9877")]
)
def test_a_reported_sparsity_has_a_valid_key(sparsity, hint, loaded):
    data = copy.deepcopy(STUDY)
    data["models"]["made"]["sparsity"] = sparsity
    [line] = loaded(data)[1]
    assert f"models.made.sparsity = {sparsity}: expected at most four" in line
    assert line.endswith(f"nearest match: {hint}")
    data["models"]["made"]["sparsity"] = float(hint)
    assert loaded(data)[1] == []


@pytest.mark.parametrize("key", ["mean", "match"])
def test_keys_of_a_file_are_refused_for_other_sources(key, loaded):
    data = copy.deepcopy(STUDY)
    data["models"]["made"] |= {"mean": [0.5], "std": [0.5]} if key == "mean" else {key: "order"}
    [line] = loaded(data)[1]
    assert f"models.made.{key} = " in line
    assert ": expected it only beside a file" in line
