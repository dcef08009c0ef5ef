"""The JSON schema of a study file, and the page of all keys: complete, current, and right."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from robsparse.base import registry
from robsparse.cli.main import main
from robsparse.schema import json_schema
from robsparse.schema.fields import Strict, key_descriptions
from robsparse.tools import config_page

FLOAT = r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"


class Yaml12(yaml.SafeLoader):
    """Reads 2e-3 as a number, like the YAML 1.2 of editors."""


Yaml12.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith("float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(FLOAT), list("-+.0123456789"))


@pytest.fixture(scope="module")
def schema():
    return json_schema.build()


@pytest.fixture(scope="module")
def check(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    return lambda data: [list(error.absolute_path) for error in validator.iter_errors(data)]


CONFIGS = sorted(path.stem for path in Path(__file__).parents[2].glob("config/*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_study_of_the_project_fits_and_names_the_schema(name, check, repository):
    text = (repository / "config" / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert check(yaml.load(text, Yaml12)) == []


WRONG = {
    "an unknown section": (("methodes",), {}, []),
    "an unknown key": (("threat", "epsilon"), 0.1, ["threat"]),
    "an unknown key of a method": (("methods", "bcs", "innit"), 1, ["methods", "bcs"]),
    "a wrong choice": (("methods", "bcs", "init"), "erkk", ["methods", "bcs", "init"]),
    "a wrong number": (("evaluation", "n_examples"), 0, ["evaluation", "n_examples"]),
    "a wrong sparsity": (("grid", "sparsities"), [90], ["grid"]),
    "a wrong eps": (("threat", "eps"), "8/x", ["threat", "eps"]),
    "a variant without a base": (("methods", "mine"), {"train": {}}, ["methods", "mine"]),
    "a wrong base": (("archs", "mine"), {"base": "vgg"}, ["archs", "mine", "base"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_found_at_its_place(what, check, tiny):
    (*parents, last), value, place = WRONG[what]
    data = copy.deepcopy(tiny)
    inner = data
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert check(tiny) == []
    assert check(data) == [place]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("threat", "eps"), "8/255"),
        (("evaluation", "attacks", "minimum_norm"), None),
        (("methods", "mine"), {"base": "bcs", "label": "Mine", "init": "erk"}),
        (("grid", "training"), {"batch_size": 32}),
        (("grid", "params"), {"lwm": {"finetune": {"lr": 0.1}}}),
        (("models",), {"m": {"zoo": "X", "dataset": "digits", "objective": "at"}}),
    ],
)
def test_what_check_allows_fits(path, value, check, tiny):
    *parents, last = path
    inner = tiny
    for key in parents:
        inner = inner[key]
    inner[last] = value
    assert check(tiny) == []
    tiny["grid"] = [tiny["grid"]]  # a list of blocks
    assert check(tiny) == []


def test_every_key_has_a_description(schema):
    models = {"the file": schema, **schema["$defs"]}
    missing = {
        name: keys
        for name, model in models.items()
        if (keys := [k for k, v in model.get("properties", {}).items() if "description" not in v])
    }
    assert missing == {}


def test_every_registered_part_is_in_its_section(schema):
    for path, kind in json_schema.SECTIONS.items():
        place = schema
        for key in path:
            place = place["properties"][key]
            if "$ref" in place:
                place = schema["$defs"][place["$ref"].rsplit("/", 1)[1]]
        assert sorted(place["properties"]) == registry.names(kind)


def test_descriptions_are_read_from_docstrings_of_a_model_and_its_bases():
    class Base(Strict):
        """The base.

        first: from the base,
            in two lines.
        """

        first: int = 0

    class Model(Base):
        """A model. It has keys.

        note: this is no key.

        second, third: of the model. fourth: in the same line.
        """

        second: int = 0
        third: int = 0
        fourth: int = 0

    made = Model.model_json_schema()
    found = {key: own["description"] for key, own in made["properties"].items()}
    assert found == {
        "first": "from the base, in two lines",
        "second": "of the model",
        "third": "of the model",
        "fourth": "in the same line",
    }
    assert made["description"] == "A model. It has keys.\n\nnote: this is no key."


def test_a_docstring_without_keys_stays_as_it_is():
    text = "One.\n\nTwo: three.\n    Four."
    assert key_descriptions(text, {"one"}) == ("One.\n\nTwo: three. Four.", {})


def test_committed_schema_and_page_are_current(repository, tmp_path, monkeypatch, capsys):
    """After a change of a setting, run `robsparse schema --write`."""
    for name in ("config", "docs"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["schema", "--write"]) == 0
    for name in ("config/schema.json", "docs/config.md"):
        assert (tmp_path / name).read_text() == (repository / name).read_text(), name
    capsys.readouterr()
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema.build()
    assert main(["schema", "--page"]) == 0
    assert capsys.readouterr().out == (repository / "docs" / "config.md").read_text()


def test_outside_the_repository_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["schema", "--write"]) == 2
    assert "expected to run in the repository" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_link_of_the_page_has_its_heading():
    text = config_page.page()
    headings = {
        line.lstrip("# ").lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("##")
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert {"fromscratch", "crafting", "train"} <= links
    assert links <= headings


def test_the_page_names_values_bounds_and_defaults():
    lines = config_page.page().splitlines()
    assert "| **`eps`** | number > 0 or text like 8/255 |  | " in "\n".join(lines)
    [init] = [line for line in lines if line.startswith("| `init` | `strict`, `authors`")]
    assert '| `"strict"` | initial active weights' in init
    assert all(line.count(" | ") >= 3 for line in lines if line.startswith("| `"))
