"""Provenance: commit, changed files and libraries, as columns of a row."""

import subprocess

import pytest

from robsparse.records import provenance
from robsparse.records.rows import Row


def test_provenance_fills_its_columns(row_values):
    found = provenance.current()
    assert Row(**row_values | found).code_version.startswith("0.")
    assert "torch=" in found["libraries"]
    assert "pyautoattack=0.2.0" in found["libraries"]


# ---------------------------------------------------------------- the commit


def git(folder, *words):
    done = subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository with a package of two folders; provenance reads these folders."""
    folders = [tmp_path / "robsparse", tmp_path / "baselines"]
    for folder in folders:
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "start")
    monkeypatch.setattr(provenance, "_code_folders", lambda: folders)
    provenance.current.cache_clear()
    yield tmp_path
    provenance.current.cache_clear()


def test_commit_of_unchanged_code_is_recorded(checkout):
    (checkout / "notes.txt").write_text("not code")
    (checkout / "results.py").write_text("not in a folder of the package")
    found = provenance.current()
    assert found["code_version"].endswith("+" + git(checkout, "rev-parse", "--short=12", "HEAD"))
    assert not found["code_dirty"]


@pytest.mark.parametrize(
    "name",
    ["robsparse/__init__.py", "baselines/mine.py", "robsparse/new.py", "baselines/ignored.py"],
)
def test_code_with_changed_or_untracked_files_is_dirty(name, checkout):
    (checkout / name).write_text("x = 1\n")
    assert provenance.current()["code_dirty"]


def test_commit_of_another_project_around_the_package_is_not_recorded(checkout):
    folder = checkout / ".venv" / "robsparse"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    assert provenance._git_state([folder]) == ("", False)
    assert provenance._git_state([checkout / "robsparse"])[0]


def test_git_variables_of_a_hook_are_ignored(checkout, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert provenance._git_state([checkout / "robsparse"])[0]


def test_provenance_covers_the_code_of_every_package(repository):
    found = {folder.relative_to(repository).as_posix() for folder in provenance._code_folders()}
    assert found == {"robsparse", "method", "baselines", "eval", "figures"}
