"""The notebook in examples/ runs from top to bottom and shows what its text says."""

import os
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NAME = "use_a_network.ipynb"
BIN = Path(sys.executable).parent  # the notebook calls the command robsparse


@pytest.fixture
def notebook(repository):
    return nbformat.read(repository / "examples" / NAME, as_version=4)


def text_of(notebook):
    """What the cells print, in one text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def run(notebook, project, repository, monkeypatch):
    """run() -> the notebook after it ran in a folder with copies of the checkout's files."""
    monkeypatch.setenv("PATH", os.pathsep.join((str(BIN), os.environ["PATH"])))
    shutil.copytree(repository / "results" / "reference", project.root / "results" / "reference")
    (project.root / "examples").mkdir()
    place = {"metadata": {"path": str(project.root / "examples")}}
    client = nbclient.NotebookClient(notebook, timeout=None, resources=place)
    return client.execute


def test_notebook_runs_from_top_to_bottom(run, project):
    printed = text_of(run())  # an error in a cell is raised here
    folder = project.root / "results" / "tiny" / "export"
    [path] = folder.rglob("*.compact.safetensors")
    assert f"{path.relative_to(project.root)}: " in printed
    assert "small_cnn (1, 8, 8) digits/small_cnn/bcs/at/s0.9000/seed0" in printed
    assert printed.count(" of 50 images") == 3 + 2  # two calls of evaluate
    assert "no gradient on 100% of the images" in printed


def test_outputs_in_the_repository_are_of_one_run(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "no gradient on 100% of the images" in text_of(notebook)
