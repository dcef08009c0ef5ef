"""The registry reads files without running them, and reads the same values as an import."""

import importlib
import json
import subprocess
import sys

import pytest

from robsparse.base import registry
from robsparse.base.errors import UsageError

ENTRIES = [(kind, name) for kind in registry.PACKAGES for name in registry.names(kind)]

METHOD = '''
"""A method."""

from typing import Literal

import torch
from pydantic import Field, PositiveInt

from robsparse.schema import Fit, Strict
from robsparse.training.stages import Stage

LABEL = "Mine"
STARTS_FROM = "dense"


class Finetune(Fit):
    """Epochs and rate."""

    epochs: PositiveInt = 3
    lr: float = Field(0.5, gt=0)


class Params(Strict):
    """finetune: the stage."""

    finetune: Finetune = Finetune()
    kind: Literal["a", "b"] = "b"


class Work(Stage):
    name = "work"


def stages(params):
    return [Work(params.finetune)]
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package({"file.py": text}) makes and registers a package of methods; returns its name."""

    def make(files):
        name = f"methods_{tmp_path.name}"
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text('raise RuntimeError("nobody imports me")')
        for path, text in files.items():
            (folder / path).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(registry.PACKAGES, "method", (name,))
        importlib.invalidate_caches()
        registry._entries.cache_clear()
        return folder

    yield make
    registry._entries.cache_clear()


def refusal():
    with pytest.raises(UsageError) as caught:
        _ = [registry.entry("method", name) for name in registry.names("method")]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- registered parts


def test_all_parts_of_the_repository_are_found():
    assert {"admm", "bcs", "dense", "hydra", "lwm"} < set(registry.names("method"))
    assert {"autoattack", "clean", "pgd"} <= set(registry.names("attack"))
    assert "digits" in registry.names("dataset")
    assert "small_cnn" in registry.names("arch")


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_params_read_from_the_text_equal_those_of_the_import(kind, name):
    read, imported = registry.entry(kind, name).params, registry.load(kind, name).Params
    assert read.model_json_schema() == imported.model_json_schema()
    if not any(field.is_required() for field in imported.model_fields.values()):
        assert read().model_dump() == imported().model_dump()
    assert read is not imported  # else nothing was read


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_literals_read_from_the_text_equal_those_of_the_import(kind, name):
    entry, module = registry.entry(kind, name), registry.load(kind, name)
    for key in ("LABEL", "STARTS_FROM", "DENSE", "NAMES"):
        assert entry.literals.get(key) == getattr(module, key, None)
    assert entry.path.samefile(module.__file__)
    assert (entry.kind, entry.name, entry.module) == (kind, name, module.__name__)


def test_reading_registry_and_a_study_loads_no_torch(repository):
    heavy = ["torch", "torchvision", "sklearn", "pyautoattack", "matplotlib", "numpy", "pandas"]
    code = (
        "import sys, json; from robsparse.base import registry\n"
        "from robsparse.study import fingerprints, loading\n"
        "study = loading.load('config/tiny.yaml')\n"
        "for kind in registry.PACKAGES: registry.names(kind)\n"
        "for cell in study.cells(): fingerprints.evaluation(study, cell, 'last')\n"
        f"print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository
    )
    assert json.loads(done.stdout) == []


def test_message_about_an_unknown_name_lists_all_names_and_the_nearest():
    with pytest.raises(UsageError) as caught:
        registry.entry("method", "hydrra")
    known = ", ".join(registry.names("method"))
    assert str(caught.value) == (
        f"unknown method 'hydrra', expected one of: {known}; nearest match: 'hydra'"
    )


# ---------------------------------------------------------------- files of the user


def test_a_file_is_a_method_with_its_name_and_is_not_run(package):
    package({"mine.py": "raise_if_run = 1 / 1\nraise RuntimeError\n" + METHOD})
    entry = registry.entry("method", "mine")
    assert registry.names("method") == ["mine"]
    assert entry.literals["STARTS_FROM"] == "dense"
    assert entry.params().finetune.epochs == 3
    assert entry.params(kind="a").kind == "a"


def test_a_file_may_define_several_names(package):
    package({"several.py": 'NAMES = ("two", "one")\n' + METHOD})
    assert registry.names("method") == ["one", "two"]
    assert registry.entry("method", "one").module.endswith(".several")


def test_files_that_start_with_an_underscore_are_no_entries(package):
    package({"mine.py": METHOD, "_helpers.py": "no python at all ("})
    assert registry.names("method") == ["mine"]


def test_constants_that_are_not_literals_are_ignored(package):
    package({"mine.py": METHOD + "\nTABLE = [x for x in range(3)]\nONE, TWO = 1, 2\n"})
    assert "TABLE" not in registry.entry("method", "mine").literals


def test_syntax_error_names_file_and_line(package):
    folder = package({"mine.py": METHOD, "broken.py": "x = 1\ndef stages(:\n"})
    message = refusal()
    assert message.startswith(f"{folder / 'broken.py'}: line 2: ")


def test_file_without_params_is_refused(package):
    folder = package({"mine.py": METHOD.replace("class Params", "class Parameters")})
    assert refusal() == (
        f"{folder / 'mine.py'}: no class Params found (expected a robsparse.schema.Strict model)"
    )


def test_params_that_are_no_model_are_refused(package):
    package({"mine.py": METHOD.replace("class Params(Strict)", "class Params")})
    assert "no class Params found" in refusal()


def test_two_files_of_one_name_are_refused(package):
    folder = package({"a.py": 'NAMES = ("x",)\n' + METHOD, "b.py": 'NAMES = ("x",)\n' + METHOD})
    message = refusal()
    assert "the method 'x' is already taken" in message
    assert str(folder / "a.py") in message
    assert str(folder / "b.py") in message


@pytest.mark.parametrize("default", ["torch.pi", "LARGEST"])
def test_error_about_params_that_cannot_be_read_is_one_line(default, package):
    """A constant or a torch value as default is a likely error in a file of the user."""
    folder = package({"mine.py": METHOD.replace("PositiveInt = 3", f"PositiveInt = {default}")})
    message = refusal()
    assert message.startswith(str(folder / "mine.py"))
    assert default.split(".")[0] in message


VALIDATOR = """
    @model_validator(mode="after")
    def _check(self):
        assert {what}
        return self
"""


def with_validator(what):
    text = METHOD.replace("import Field,", "import Field, model_validator,")
    text = "import math\nLIMIT = 3\n" + text
    return text.replace('kind: Literal["a", "b"] = "b"\n', "\\g" + VALIDATOR.format(what=what))


@pytest.mark.parametrize("name", ["math", "LIMIT", "torch", "helper"])
@pytest.mark.parametrize("what", ["{} is None", "self is None or [{} for _ in range(3)]"])
def test_error_about_a_validator_that_cannot_be_read_is_one_line(name, what, package):
    """Without this check it would be a NameError, and only if a config uses the validator."""
    text = with_validator(what.format(name)).replace("\\g", 'kind: Literal["a", "b"] = "b"\n')
    folder = package({"mine.py": text})
    line = 1 + text.splitlines().index(f"        assert {what.format(name)}")
    assert refusal() == (
        f"{folder / 'mine.py'}: line {line}: the name '{name}' is not known here; parameter "
        "classes may use only literals and names from typing, pydantic, robsparse.schema"
    )


@pytest.mark.parametrize("what", ["len([1])", "self.finetune and Params and Field", "min(1, 2)"])
def test_validator_of_known_names_is_read(what, package):
    package({"mine.py": with_validator(what).replace("\\g", 'kind: Literal["a", "b"] = "b"\n')})
    assert registry.entry("method", "mine").params().kind == "b"


@pytest.mark.parametrize(
    ("what", "reported"), [("1 / 0", "ZeroDivisionError"), ("self.nothing", "AttributeError")]
)
def test_message_about_a_failing_validator_names_its_line(
    what, reported, package, study_data, load_study
):
    text = with_validator(what).replace("\\g", 'kind: Literal["a", "b"] = "b"\n')
    dense = "DENSE = True\n" + METHOD.replace('STARTS_FROM = "dense"', "")
    folder = package({"mine.py": text, "dense.py": dense})
    study_data["grid"]["methods"], study_data["methods"] = ["mine"], {"mine": {"kind": "a"}}
    with pytest.raises(UsageError) as caught:
        load_study(study_data)
    assert f"methods.mine: {folder / 'mine.py'}, line " in str(caught.value)
    assert reported in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["3", '"mine"', '("mine", 3)', "{}"])
def test_error_about_an_invalid_name_is_one_line(value, package):
    folder = package({"mine.py": f"NAMES = {value}\n" + METHOD})
    assert refusal().startswith(f"{folder / 'mine.py'}: NAMES = ")


@pytest.mark.parametrize("text", ["X = {[1]: 2}\n", "X = {1, [2]}\n", "X = b'a' + 1\n"])
def test_constants_that_cannot_be_evaluated_are_ignored(text, package):
    package({"mine.py": METHOD + text})
    assert "X" not in registry.entry("method", "mine").literals


@pytest.mark.parametrize("text", ["x = 1\0\n", "(" * 3000, "x = " + "-" * 100000 + "1\n"])
def test_error_about_a_file_with_a_syntax_error_is_one_line(text, package):
    folder = package({"mine.py": METHOD})
    (folder / "broken.py").write_text(text + METHOD)
    assert refusal().startswith(f"{folder / 'broken.py'}: ")


def test_error_about_a_file_that_is_not_utf8_is_one_line(package):
    folder = package({"mine.py": METHOD})
    (folder / "latin.py").write_bytes('"""\xe4"""\n'.encode("latin-1") + METHOD.encode())
    assert str(folder / "latin.py") in refusal()


def test_error_about_a_file_with_a_null_byte_is_one_line(package):
    folder = package({"mine.py": METHOD, "null.py": METHOD + "\0"})
    assert str(folder / "null.py") in refusal()


def test_literals_may_have_a_type_annotation(package):
    package({"mine.py": 'STARTS_FROM: str = "dense"\n' + METHOD})
    assert registry.entry("method", "mine").literals["STARTS_FROM"] == "dense"


# ---------------------------------------------------------------- errors in one file


def test_an_error_in_a_file_matters_only_if_the_file_is_used(package):
    package({"mine.py": METHOD, "broken.py": "def f(:"})
    assert registry.entry("method", "mine").name == "mine"
    with pytest.raises(UsageError, match=r"broken\.py: line 1"):
        registry.entry("method", "broken")


def test_error_about_a_module_that_cannot_be_imported_is_one_line(package):
    package({"__init__.py": "", "mine.py": METHOD + "\nimport no_such_module\n"})
    registry.entry("method", "mine")
    with pytest.raises(UsageError, match=r"mine\.py, line \d+: ModuleNotFoundError: No module"):
        registry.load("method", "mine")


def test_error_about_a_method_without_stages_is_one_line(package):
    package({"__init__.py": "", "mine.py": METHOD.partition("def stages")[0]})
    with pytest.raises(UsageError, match=r"mine\.py: no function stages\(params\)"):
        registry.load("method", "mine")


class Point:
    def __init__(self, name, module):
        self.name, self.module = name, module


def test_an_entry_point_is_a_method_with_the_name_of_the_entry_point(package, monkeypatch):
    folder = package({"__init__.py": "", "mine.py": METHOD})
    module = f"{folder.name}.mine"
    points = [Point("theirs", module), Point("mine", module), Point("gone", "no_such_package.x")]
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: points)
    registry._entries.cache_clear()
    assert registry.entry("method", "theirs").path == folder / "mine.py"
    with pytest.raises(UsageError, match="the method 'mine' is already taken by"):
        registry.entry("method", "mine")
    with pytest.raises(
        UsageError, match="no such file; the method 'gone' of an installed package needs it"
    ):
        registry.entry("method", "gone")
