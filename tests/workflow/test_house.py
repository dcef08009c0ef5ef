"""The house rules: style, one-way imports, nothing of one machine in the repository."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import one_tree
from robsparse.cli.main import main

BIN = Path(sys.executable).parent
ROOMS = ("method", "baselines", "eval", "figures")
# Packages that the workflow loads while it is being planned, before torch.
PLANNING = ("base", "schema", "records", "study", "collection")


def run(*words, cwd, **environment):
    return subprocess.run(
        [BIN / words[0], *words[1:]],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# ---------------------------------------------------------------- style, imports, types

PRE_COMMIT = yaml.safe_load((one_tree.ROOT / ".pre-commit-config.yaml").read_text())
HOOKS = {hook["id"]: hook for repo in PRE_COMMIT["repos"] for hook in repo["hooks"]}


@pytest.mark.parametrize("hook", HOOKS)
def test_check_that_runs_before_a_commit_passes(hook, repository):
    done = run(*shlex.split(HOOKS[hook]["entry"]), cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr


def test_checks_before_a_commit_are_local_and_of_the_whole_checkout():
    assert set(HOOKS) == {"ruff-check", "ruff-format", "snakefmt", "imports", "types"}
    assert {repo["repo"] for repo in PRE_COMMIT["repos"]} == {"local"}  # nothing is fetched
    for hook in HOOKS.values():
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_wrong_types_are_found(mirror, repository):
    lines = {
        "def untyped(x): return x": "no-untyped-def",
        "number: int = 'one'": "assignment",
        "def absent(x: int = None) -> int: return x": "assignment",
        "import torch  # type: ignore": "unused-ignore",
        "from robsparse.method import bcs; bcs.stages(1)": "arg-type",
    }
    plant(mirror, "baselines.lwm", "\n".join(lines))
    places = {"PYTHONPATH": str(mirror), "MYPY_CACHE_DIR": str(repository / ".mypy_cache")}
    done = run("mypy", "-m", "robsparse.baselines.lwm", cwd=mirror, **places)
    assert re.findall(r"\[([a-z-]+)\]\n", done.stdout) == list(lines.values())


# ---------------------------------------------------------------- imports


@pytest.fixture
def mirror(tmp_path):
    """The package as one tree, to be changed by a test."""
    one_tree.build(tmp_path)
    return tmp_path


def lint_imports(mirror):
    return run("lint-imports", "--no-cache", cwd=mirror, PYTHONPATH=str(mirror))


def plant(mirror, module, line):
    """Put a line at the end of a module, or of the first lines of a package; make what is new."""
    path = mirror / "robsparse" / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n\n{line}\n")


def test_import_contracts_are_kept(mirror):
    done = lint_imports(mirror)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_package_stands_in_a_layer_and_is_installed(repository):
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]
    [layers] = [c for c in settings["importlinter"]["contracts"] if c["type"] == "layers"]
    named = {name for layer in layers["layers"] for name in layer.split(" | ")}
    folders = {path.parent.name for path in (repository / "robsparse").glob("*/__init__.py")}
    assert named == folders | set(ROOMS)
    inside = [path.parent for room in ROOMS for path in (repository / room).rglob("__init__.py")]
    nested = (repository / "robsparse").glob("*/*/__init__.py")
    names = [
        *folders,
        *(".".join(path.relative_to(repository).parts) for path in inside),
        *(".".join(path.parent.parts[-2:]) for path in nested),
    ]
    installed = settings["setuptools"]["packages"]
    assert set(installed) == {"robsparse", *(f"robsparse.{name}" for name in names)}


def test_modules_lie_in_packages_of_about_ten_files(repository):
    package = repository / "robsparse"
    assert sorted(path.name for path in package.glob("*.py")) == ["__init__.py", "__main__.py"]
    sizes = {path.name: len([*path.glob("[!_]*.py")]) for path in package.iterdir()}
    assert {name: size for name, size in sizes.items() if size > 12} == {}


VIOLATIONS = {
    "core sees a method": ("training.loop", "import robsparse.baselines.lwm"),
    "core sees an attack": ("evaluation.evaluate", "import robsparse.eval.pgd"),
    "core sees figures": ("records.rows", "import robsparse.figures.tables.study_tables"),
    "training sees evaluation": ("training.loop", "import robsparse.evaluation.attacks"),
    "evaluation sees training": ("evaluation.attacks", "import robsparse.training.stages"),
    "a lower package sees a higher one": ("base.errors", "import robsparse.study.cells"),
    "method sees a baseline": ("method.bcs", "import robsparse.baselines.hydra"),
    "baseline sees the method": ("baselines.lwm", "import robsparse.method.bcs"),
    "baseline sees another baseline": ("baselines.lwm", "import robsparse.baselines.hydra"),
    "baseline sees an attack": ("baselines.lwm", "import robsparse.eval.pgd"),
    "baseline sees the evaluator": ("baselines.lwm", "import robsparse.evaluation"),
    "method sees the evaluator": ("method.bcs", "import robsparse.evaluation"),
    "attack sees a method": ("eval.pgd", "import robsparse.method.bcs"),
    "attack sees training": ("eval.pgd", "import robsparse.training.stages"),
    "figures see torch": ("figures.tables.study_tables", "import torch"),
    "figures see torch through the core": (
        "figures.tables.study_tables",
        "import robsparse.sparsity.masks",
    ),
    "figures see an attack": ("figures.tables.study_tables", "import robsparse.eval.clean"),
    "a package is in no layer": ("extra", ""),
} | {f"planning sees torch: {package}": (package, "import torch") for package in PLANNING}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_planted_violation_of_the_import_contracts_is_caught(violation, mirror):
    plant(mirror, *VIOLATIONS[violation])
    done = lint_imports(mirror)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " 0 broken" not in done.stdout


def test_rooms_are_never_imported_by_their_bare_names(repository):
    pattern = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(ROOMS)})\b", re.MULTILINE)
    assert [name for name in python_files(repository) if pattern.search(name.read_text())] == []


def python_files(repository):
    folders = ("robsparse", "tests", "rules", *ROOMS)
    found = [path for name in folders for path in (repository / name).rglob("*") if path.is_file()]
    return [path for path in found if path.suffix in (".py", ".smk")]


# ---------------------------------------------------------------- the repository


def tracked(repository):
    if not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    names = run_git(repository, "ls-files", "-z").split("\0")
    return [repository / name for name in names if name and (repository / name).is_file()]


def run_git(repository, *words):
    return subprocess.run(
        ["git", *words], cwd=repository, capture_output=True, text=True, check=True
    ).stdout


def test_no_tracked_file_names_a_place_on_one_machine(repository):
    places = "|".join(("home", "root", "Users", "tmp", "work", "mnt", "scratch"))
    pattern = re.compile(rf"(?<![\w.}})/])/(?:{places})/\w".encode())
    found = {
        str(path.relative_to(repository)): match.group().decode()
        for path in tracked(repository)
        if (match := pattern.search(path.read_bytes()))
    }
    assert found == {}


def test_no_generated_file_is_tracked(repository):
    generated = re.compile(r"__pycache__|\.egg-info|\.snakemake|^results/(?!reference/|published/)")
    names = [str(path.relative_to(repository)) for path in tracked(repository)]
    assert [name for name in names if generated.search(name)] == []


def test_no_tracked_file_is_larger_than_a_megabyte(repository):
    assert [path for path in tracked(repository) if path.stat().st_size > 2**20] == []


# ---------------------------------------------------------------- a new method


def test_a_new_file_is_a_method_by_one_line_of_a_config(mirror, tiny, project):
    """What the README promises, with a copy of LWM."""
    baselines = mirror / "robsparse" / "baselines"
    text = (baselines / "lwm.py").read_text().replace('LABEL = "LWM"', 'LABEL = "Mine"')
    (baselines / "mine.py").write_text(text)
    tiny["grid"] |= {"methods": ["dense", "lwm"], "seeds": [0]}
    study = project.write(tiny)
    dense, mine = ("dense/at/s0.0000/seed0", "mine/at/s0.9000/seed0")
    results = ("--results", str(project.root / "results"))
    key = f"digits/small_cnn/{dense}"
    assert main(["train", str(project.root / study), "--cell", key, *results]) == 0
    tiny["grid"]["methods"].append("mine")
    tiny["methods"]["mine"] = {"finetune": {"epochs": 1}}
    project.write(tiny)

    def python(*words):
        done = project.run(sys.executable, "-m", *words, PYTHONPATH=str(mirror))
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    python("robsparse", "train", study, "--cell", f"digits/small_cnn/{mine}")
    assert (project.root / f"results/tiny/models/digits/small_cnn/{mine}/training.json").exists()
    assert mine in python("snakemake", "-n", "--configfile", study)


def test_every_test_that_a_document_names_exists(repository):
    """In docs, `file.py::test_word` stands for the tests of the file whose names begin so."""
    named = re.compile(r"(test_\w+)\.py((?:(?:, )?::test_\w+)+)")
    for document in sorted((repository / "docs").glob("*.md")):
        text = " ".join(document.read_text(encoding="utf-8").split())
        for file, names in named.findall(text):
            paths = (repository / "tests").glob(f"*/{file}.py")  # of unit, contract and workflow
            source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
            there = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
            for name in re.findall(r"::(test_\w+)", names):
                assert any(one.startswith(name) for one in there), (
                    f"{document.name}: {file}::{name}"
                )


def test_continuous_integration_runs_the_test_command_alone(repository):
    settings = yaml.safe_load((repository / ".github/workflows/test.yml").read_text())
    [job] = settings["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]


def test_files_and_pages_that_a_document_names_exist(repository):
    """Files in folders of the repository, except those that the reader of a page writes."""
    by_reader = {"baselines/scaled_magnitude.py", "config/mine.yaml"}
    folders = "robsparse|method|baselines|eval|figures|tests|docs|config|benchmarks"
    named = re.compile(rf"`((?:{folders})/[\w./]*)`")
    linked = re.compile(r"\]\((?!https?:)([^)#]+)\)")
    missing = []
    for document in sorted([*repository.glob("*.md"), *(repository / "docs").glob("*.md")]):
        if document.name == "CHANGELOG.md":  # it names files of earlier versions
            continue
        text = document.read_text(encoding="utf-8")
        paths = [repository / name for name in named.findall(text) if name not in by_reader]
        paths += [document.parent / name for name in linked.findall(text)]
        missing += [f"{document.name}: {path}" for path in paths if not path.exists()]
    assert missing == []
