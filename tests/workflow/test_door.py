"""Methods of an installed package and networks from elsewhere join; broken ones fail alone."""

import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from robsparse import models
from robsparse.base import registry

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "robsparse-extra"
version = "1.0"

[project.entry-points."robsparse.methods"]
halves = "robsparse_extra.halves"
breaks = "robsparse_extra.breaks"
lacks = "robsparse_extra.lacks"

[tool.setuptools]
packages = ["robsparse_extra"]
""",
    "robsparse_extra/__init__.py": "",
    "robsparse_extra/halves.py": '''
"""A method of somebody else. Source: none."""

from robsparse.schema import FromScratch, Strict
from robsparse.sparsity.budgets import (layer_keep_counts)
from robsparse.sparsity.masks import (random_masks)
from robsparse.training.stages import FixedMaskStage

LABEL = "Halves"


class Params(Strict):
    """train: how."""

    train: FromScratch = FromScratch()


def masks(run):
    return random_masks(run.model, layer_keep_counts(run.model, run.sparsity), run.generator)


def stages(params):
    return [FixedMaskStage("train", params.train, masks)]
''',
}
BREAKS = """
class Breaking(FixedMaskStage):
    def after_step(self, run):
        if run.step == 3:
            raise ZeroDivisionError("by design")


def stages(params):
    return [Breaking("train", params.train, masks)]
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory, project_at):
    """The folder of an installed package with three methods, of which one works."""
    folder = tmp_path_factory.mktemp("package")
    good = PACKAGE["robsparse_extra/halves.py"]
    files = PACKAGE | {
        "robsparse_extra/breaks.py": good.split("def stages")[0] + BREAKS,
        "robsparse_extra/lacks.py": good.replace("import Fixed", "import NoSuch, Fixed"),
    }
    for name in ("breaks", "lacks"):
        file = f"robsparse_extra/{name}.py"
        files[file] = files[file].replace('"Halves"', f'"{name.title()}"')
    for name, text in files.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    project = project_at(folder / "project")
    words = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    target = folder / "site"
    done = project.run(
        sys.executable, "-m", "pip", "install", *words, "--target", target, folder / "source"
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A state dict saved by torch, half of whose weights are zero, and files like it."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(3)
    params = registry.entry("arch", "small_cnn").params(width=4)
    state = models.build("small_cnn", params, (1, 8, 8), 10).state_dict()
    for value in state.values():
        if value.ndim > 1:
            value.view(-1)[::2] = 0.0
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "good.pt")
    broken = {k: torch.full_like(v, float("nan")) if v.ndim > 1 else v for k, v in state.items()}
    torch.save(broken, folder / "nan.pt")
    torch.save({f"other.{k}": v for k, v in state.items()}, folder / "renamed.pt")
    torch.save({k: v for k, v in state.items() if "bias" not in k}, folder / "short.pt")
    torch.save(Trap(folder / "trapped"), folder / "trap.pt")
    return folder


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture(scope="module")
def finished(project_at, package, given, repository, tmp_path_factory):
    """A study with a good and two broken methods of the package, a good and a bad network."""
    project = project_at(tmp_path_factory.mktemp("door") / "project")
    study = yaml.safe_load((repository / "config" / "tiny.yaml").read_text())
    study["grid"] |= {"methods": ["dense", "lwm", "halves", "breaks", "lacks"], "seeds": [0]}
    scratch = {"train": {"epochs": 2}}
    study["methods"] |= {"halves": scratch, "breaks": scratch, "lacks": scratch}
    common = {"arch": "small_cnn", "dataset": "digits", "objective": "at"}
    study["models"] = {
        "given": common | {"file": str(given / "good.pt"), "sparsity": 0.5, "label": "Given"},
        "claims": common | {"file": str(given / "good.pt"), "sparsity": 0.9},
        "bad": common | {"file": str(given / "nan.pt"), "sparsity": 0.9},
    }
    study["evaluation"] |= {"n_examples": 4, "batch_size": 4}
    study["evaluation"]["selections"] = {"best_val": ["clean", "autoattack"]}
    project.write(study)
    words = ("--cores", "2", "--configfile", "config/tiny.yaml")
    done = project.run("snakemake", *words, PYTHONPATH=str(package))
    return project, done


def table(project, name):
    return pd.read_csv(project.root / "results" / "tiny" / "partial" / name)


def test_broken_cells_fail_alone(finished):
    project, done = finished
    assert done.returncode == 1
    assert set(table(project, "results.csv").method) == {
        "dense",
        "lwm",
        "halves",
        "given",
        "claims",
    }


def test_each_failure_is_one_line_that_names_file_and_reason(finished):
    project, _ = finished
    reasons = table(project, "failures.csv").set_index("method").reason.to_dict()
    assert set(reasons) == {"breaks", "lacks", "bad"}
    assert "breaks.py, line" in reasons["breaks"]
    assert "ZeroDivisionError: by design" in reasons["breaks"]
    assert "lacks.py, line" in reasons["lacks"]
    assert "NoSuch" in reasons["lacks"]
    assert "nan.pt" in reasons["bad"]
    assert "holds NaN" in reasons["bad"]


def test_the_table_shows_failed_cells_as_failed(finished):
    project, done = finished
    path = project.root / "results" / "tiny" / "partial" / "tables" / "main.md"
    text = path.read_text()
    failed = [line for line in text.splitlines() if line.count("failed §") == 2]
    assert [line.split("|")[1].strip() for line in failed] == ["Breaks", "Lacks", "bad"]
    assert "ZeroDivisionError: by design" in text
    assert "External models, trained elsewhere" in text
    assert "main table: results/tiny/partial/tables/main.md" in done.stdout + done.stderr


def test_networks_from_elsewhere_are_counted_and_a_wrong_claim_is_marked(finished):
    project, _ = finished
    rows = table(project, "results.csv").query("attack == 'clean'").set_index("method")
    assert rows.sparsity_reached["given"] == pytest.approx(0.5, abs=0.01)
    assert pd.isna(rows.budget["given"])
    assert "asked" in rows.budget["claims"]
    assert rows.epochs.isna()["given"]


def test_the_same_command_tries_the_failed_cells_again(finished, package):
    project, _ = finished
    words = ("-n", "--cores", "2", "--configfile", "config/tiny.yaml")
    done = project.run("snakemake", *words, PYTHONPATH=str(package))
    for name in ("breaks", "lacks", "bad"):
        assert f"train digits/small_cnn/{name}/at" in done.stdout + done.stderr
    assert "train digits/small_cnn/halves" not in done.stdout + done.stderr


def test_a_result_is_exported_in_the_form_of_robustbench(finished, package):
    project, _ = finished
    cell = "digits/small_cnn/lwm/at/s0.9000/seed0"
    words = ("export", "config/tiny.yaml", "--cell", cell, "--format", "robustbench")
    done = project.run("robsparse", *words, PYTHONPATH=str(package))
    assert done.returncode == 0, done.stderr
    path = project.root / "results/tiny/export" / cell / "best_val.model_info.json"
    info = json.loads(path.read_text())
    rows = table(project, "results.csv").query("method == 'lwm' and component == 'all'")
    rows = rows.set_index("attack").accuracy
    assert info["clean_acc"] == f"{100 * rows['clean']:.2f}"
    assert info["autoattack_acc"] == f"{100 * rows['autoattack']:.2f}"
    assert (info["dataset"], info["architecture"]) == ("digits", "small_cnn")
    assert info["eps"] == "0.15"
    assert info["additional_data"] is False
    assert info["link"] is None


# ---------------------------------------------------------------- one network without a study


def evaluate(project, *words):
    options = ("--arch", "small_cnn", "--dataset", "digits", "--eps", "0.15")
    options += ("--attacks", "clean,pgd", "--n-examples", "20")
    return project.run("robsparse", "evaluate", *options, *map(str, words))


@pytest.fixture
def narrow(project, given, monkeypatch):
    """Weights of the default width, as the command has no option for it."""
    torch.manual_seed(3)
    params = registry.entry("arch", "small_cnn").params()
    state = models.build("small_cnn", params, (1, 8, 8), 10).state_dict()
    path = project.root / "weights.pt"
    torch.save(state, path)
    return path, state


def test_a_file_is_evaluated_without_a_study(narrow, project):
    path, state = narrow
    done = evaluate(project, "--weights", path)
    assert done.returncode == 0, done.stderr
    total = sum(value.numel() for value in state.values() if value.ndim > 1)
    assert f"{total:,} of {total:,} prunable weights are nonzero" in done.stdout
    assert "clean" in done.stdout
    record = json.loads(path.with_name("weights.pt.Linf-0.15.evaluation.json").read_text())
    assert {row["attack"] for row in record["rows"]} == {"clean", "pgd"}
    assert f"record: {path}.Linf-0.15.evaluation.json" in done.stdout


def test_parameters_of_the_architecture_are_options(given, project):
    words = ("--weights", given / "good.pt", "--arch-option")
    done = evaluate(project, *words, "width=4")
    assert done.returncode == 0, done.stderr
    assert "(sparsity 0.5" in done.stdout
    assert "unknown key" in evaluate(project, *words, "widht=4").stderr
    assert "expected KEY=VALUE" in evaluate(project, *words, "width").stderr


def test_tensors_may_be_matched_by_order(narrow, project):
    path, state = narrow
    torch.save({f"x{i}": value for i, value in enumerate(state.values())}, path)
    assert "missing" in evaluate(project, "--weights", path).stderr
    done = evaluate(project, "--weights", path, "--match", "order")
    assert done.returncode == 0, done.stderr
    torch.save({"x": torch.ones(2)}, path)
    done = evaluate(project, "--weights", path, "--match", "order")
    assert done.returncode == 2
    assert "1 tensors, expected" in done.stderr


REFUSED = {
    "nan.pt": "has shape",
    "renamed.pt": "are missing",
    "short.pt": "are missing",
    "trap.pt": "was not opened",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_one_line_and_runs_nothing(name, given, project):
    done = evaluate(project, "--weights", given / name)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert name in line
    assert REFUSED[name] in line
    assert not (given / "trapped").exists()
    assert not list(given.glob(f"{name}*.evaluation.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected CONFIG --cell KEY, or --weights FILE"),
        (("--weights", "none.pt"), "no such file"),
        (("--weights", "none.pt", "--arch", "smal_cnn"), "no such file"),
    ],
)
def test_a_command_without_a_network_says_what_it_expects(words, message, project):
    done = evaluate(project, *words)
    assert done.returncode == 2
    assert message in done.stderr
