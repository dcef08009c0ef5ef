"""A new method from the template is a whole method at once."""

import importlib
import importlib.util
import itertools

import pytest

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.tools import scaffold

COUNT = itertools.count()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package that holds a copy of the template and nothing else."""
    name = f"scaffolded{next(COUNT)}"
    made = tmp_path / name
    made.mkdir()
    (made / "__init__.py").write_text("")
    (made / "template.py").write_text(registry.entry("method", "template").path.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.PACKAGES, "method", (name,))
    importlib.invalidate_caches()
    registry._entries.cache_clear()
    yield made
    registry._entries.cache_clear()


@pytest.mark.parametrize(
    ("name", "label", "printed"),
    [
        ("my_idea", None, "My idea"),
        ("best", 'The "best" one', 'The "best" one'),
        ("slash", "A\\B & C", "A\\B & C"),
    ],
)
def test_written_file_is_a_method_of_that_name(name, label, printed, folder):
    message = scaffold.new_method(name, label)
    assert str(folder / f"{name}.py") in message
    registry._entries.cache_clear()
    entry = registry.entry("method", name)
    assert entry.literals["LABEL"] == printed
    module = registry.load("method", name)
    assert module.__doc__.splitlines()[0] == f"{printed}: what it does, in one sentence."
    assert "Source:" in module.__doc__
    (stage,) = module.stages(entry.params())
    assert type(stage).__name__ == "".join(part.capitalize() for part in name.split("_")) + "Stage"


@pytest.mark.parametrize("name", ["2x", "My", "a-b", "", "a b", "../x"])
def test_a_name_that_is_no_module_is_refused(name, folder):
    with pytest.raises(UsageError, match="expected lower-case letters"):
        scaffold.new_method(name)
    assert sorted(path.name for path in folder.glob("*.py")) == ["__init__.py", "template.py"]


def test_a_name_that_is_taken_is_refused(folder):
    scaffold.new_method("mine")
    before = (folder / "mine.py").read_text()
    with pytest.raises(UsageError, match="already exists"):
        scaffold.new_method("mine", "Another")
    assert (folder / "mine.py").read_text() == before
