"""How the compiled kernels are built, found and refused."""

import os
import shutil
import subprocess
import sys

import pytest

from robsparse.kernels import library as finder
from robsparse.kernels import sources

MODULE = "robsparse.kernels._kernels"
PLACE = "robsparse/kernels"
NAMES = (sources.COMPILED, *sources.INCLUDED, "sources.py")


@pytest.fixture(autouse=True)
def fresh():
    """`library` looks for the module again, before and after a test."""
    finder.library.cache_clear()
    yield
    finder.library.cache_clear()


def build(repository, folder, **environment):
    """Build the kernels into a folder, as an installation does."""
    places = ["--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=repository, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, [*(folder / "lib").rglob("_kernels*")]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler here")
def test_kernels_are_built_where_a_compiler_is():
    assert finder.library() is not None
    assert finder.instructions() in ("avx512", "avx2", "plain")


@pytest.mark.parametrize("compiler", [shutil.which("false"), "/nowhere/cc"])
def test_installation_without_a_compiler_goes_on_without_kernels(compiler, repository, tmp_path):
    assert build(repository, tmp_path, CC=compiler) == (0, [])


def test_network_without_kernels_prints_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert finder.library() is None
    assert finder.library() is None
    assert (finder.instructions(), finder.instructions("cuda")) == ("not built", "")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "sparse kernels: not built, so every network is computed on the dense path; install a C "
        "compiler (e.g. gcc), then install robsparse again (`make install`)"
    ]


def test_module_built_from_other_sources_is_not_used(monkeypatch, capsys):
    if finder.library() is None:
        pytest.skip("the sparse kernels are not built here")
    finder.library.cache_clear()
    monkeypatch.setattr(sources, "digest", lambda: "another")
    assert finder.library() is None
    assert "sparse kernels: built from other sources" in capsys.readouterr().out


def test_module_that_cannot_be_loaded_is_not_used(monkeypatch, capsys):
    def fail(name):
        raise ImportError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(finder.importlib, "import_module", fail)
    assert finder.library() is None
    assert "sparse kernels: not loaded (libgomp.so.1: cannot" in capsys.readouterr().out


@pytest.mark.parametrize("name", [sources.COMPILED, *sources.INCLUDED])
def test_digest_changes_with_each_source_and_the_flags(name, monkeypatch, tmp_path):
    before = sources.digest()
    for source in (sources.COMPILED, *sources.INCLUDED):
        shutil.copy(sources.FOLDER / source, tmp_path)
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    assert sources.digest() == before
    with open(tmp_path / name, "a") as file:
        file.write("\n")
    changed = sources.digest()
    monkeypatch.setattr(sources, "FLAGS", (["-O1"],))
    assert len({before, changed, sources.digest()}) == 3


@pytest.mark.parametrize(
    "name", ["setup.py", "requirements.lock", *(f"{PLACE}/{n}" for n in NAMES)]
)
def test_makefile_installs_again_after_a_change_of_a_source(name, repository, tmp_path):
    def installs(*options):
        done = subprocess.run(
            ["make", "--dry-run", "install", *options],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return "--editable" in done.stdout

    (tmp_path / PLACE).mkdir(parents=True)
    others = ["Makefile", "pyproject.toml", "constraints.txt", "requirements.lock", "setup.py"]
    for path in (*others, *(f"{PLACE}/{n}" for n in NAMES)):
        shutil.copy(repository / path, tmp_path / path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    assert not installs()
    assert installs(f"--what-if={name}")
