"""Tests of what runs again after a change of any key of a study or any file of the package.

A row names the first stage that runs again: training, evaluation, collect or figures. All later
stages then run too. A key or a file without a row is an error. docs/staleness.md shows the tables.
"""

import copy
import dataclasses
import importlib.machinery
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import BaseModel

from robsparse.schema.grid import Grid
from robsparse.schema.study_file import StudyFile
from robsparse.study import fingerprints, loading, source_code
from robsparse.study.parts import Block
from robsparse.study.study import Study

STAGES = ("training", "evaluation", "collect", "figures")
NOTHING = "nothing"
ATTACKS = "evaluation.attacks"  # the key of a file; a study has them as attack_params


def study_data(folder: Path) -> dict:
    """A study with every kind of key: variants, an external model, a table of a paper."""
    data = yaml.safe_load((Path(__file__).parents[2] / "config" / "tiny.yaml").read_text())
    np.savez(
        folder / "own.npz",
        train_images=np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8),
        train_labels=np.arange(40) % 2,
        test_images=np.zeros((20, 8, 8), dtype=np.uint8),
        test_labels=np.arange(20) % 2,
    )
    np.savez(
        folder / "changed.npz",
        train_images=np.ones((40, 8, 8), dtype=np.uint8),
        train_labels=np.arange(40) % 2,
        test_images=np.zeros((20, 8, 8), dtype=np.uint8),
        test_labels=np.arange(20) % 2,
    )
    (folder / "there").touch()
    (folder / "weights.pt").write_bytes(b"weights")
    (folder / "changed.pt").write_bytes(b"others")
    (folder / "paper.csv").write_text("published")
    data["grid"] = [
        data["grid"]
        | {
            "methods": ["dense", "other_dense", "lwm", "bcs"],
            "seeds": [0, 1],
            "budget": {"unit": "epochs", "total": 19},
        },
        {
            "datasets": ["own"],
            "archs": ["small_cnn"],
            "objectives": ["trades"],
            "methods": ["dense", "other_dense", "bcs"],
            "sparsities": [0.5],
            "seeds": [0, 1],
            "training": {"beta": 5},
            "where_exists": str(folder / "there"),
            "params": {"bcs": {"noise_scale": 0.001}},
        },
    ]
    data["datasets"]["own"] = {
        "base": "npz",
        "label": "Own",
        "file": str(folder / "own.npz"),
        "validation_examples": 10,
    }
    data["training"]["batch_size"] = 20
    data["methods"]["other_dense"] = {"base": "dense", "pretrain": {"epochs": 5, "lr": 0.1}}
    data["models"] = {
        "given": {
            "file": str(folder / "weights.pt"),
            "arch": "small_cnn",
            "dataset": "digits",
            "objective": "at",
            "sparsity": 0.9,
        }
    }
    data["evaluation"]["attacks"] = {"pgd": {"steps": 10}, "autoattack": {}, "transfer": {}}
    data["evaluation"]["selections"] = {
        "best_val": ["pgd", "autoattack", "transfer"],
        "last": ["clean"],
    }
    data["tables"] = [
        {
            "name": "paper",
            "title": "As printed",
            "datasets": ["digits"],
            "methods": ["dense", "bcs"],
            "rows": ["method"],
            "columns": ["sparsity"],
            "attacks": ["pgd"],
            "published": [str(folder / "paper.csv")],
        }
    ]
    return data


def plans(study: Study) -> dict[str, dict[str, str]]:
    """The parameters of jobs that Snakemake compares, for each stage."""
    cells = study.cells()
    return {
        "training": {cell.key: fingerprints.training(study, cell).plan for cell in cells},
        "evaluation": {
            f"{cell.key} {selection}": fingerprints.evaluation(study, cell, selection).plan
            for cell in cells
            for selection in study.evaluation.selections
        },
        "collect": {"": fingerprints.collected(study).plan},
        "figures": {"": fingerprints.figures(study, []).plan},
    }


def first_changed(before: dict, after: dict) -> str:
    """The first stage with a job that is new or has another parameter."""
    for stage in STAGES:
        if any(before[stage].get(job) != plan for job, plan in after[stage].items()):
            return stage
    return NOTHING


# The changed value of a key, by its full name or its last part. Other numbers are increased by 1.
VALUES = {
    "study": "another",
    "title": "Another",
    "small": False,
    "label": "Mine",
    "norm": "L2",
    "eps": 0.12,
    "lr": 0.07,
    "schedule": "constant",
    "milestones": [0.2, 0.3],
    "gamma": 0.2,
    "momentum": 0.5,
    "nesterov": True,
    "methods.bcs.momentum": "reset",
    "velocity": lambda old: "torch" if old == "tensorflow" else "tensorflow",
    "weight_decay": 0.001,
    "decay": lambda old: "coupled" if old == "sgdw" else "sgdw",
    "init": "uniform",
    "waking": "drift",
    "noise_scale": 1e-5,
    "regrown_theta": 1e-10,
    "regrowth": "dormant",
    "rewiring": "until_last_drop",
    "pattern": "2:4",
    "rho": 0.01,
    "dual_gradient": "authors",
    "layers": "conv",
    "projection": "percentile",
    "step_size": 0.05,
    "bn_mode": "train",
    "precision": "bf16",
    "backend": "eager",
    "augmentation": {"kind": "crop"},
    "sparse_compute": "auto",
    "label_smoothing": 0.2,
    "ema": {"decay": 0.9},
    "awp": {"gamma": 0.01},
    "s2ap": {"gamma": 0.1, "warmup": 0},
    "rst_file": "weights.pt",
    "rst_fraction": 0.25,
    "train_on_validation": True,
    "train_examples": 20,
    "classes": 2,
    "as_base": ["arch"],
    "synthetic_fraction": 0.25,
    "n_examples": 10,
    "version": "rand",
    "components": ["apgd-ce"],
    "rule": "cosine",
    "start": "image",
    "surrogate": "other_dense",
    "relative_step": 1.5,
    "match": "order",
    "sparsity": 0.5,
    "objective": "natural",
    "device": "cpu",
    "rerun_on_code_change": True,
    "archs": ["small_cnn"],
    "datasets": ["digits"],
    "objectives": ["mart"],
    "methods": ["bcs"],
    "sparsities": [0.8],
    "seeds": [0, 1, 2],
    "rows": ["method", "arch"],
    "columns": ["sparsity", "arch"],
    "attacks": ["clean"],
    "selection": "last",
    "name": "other",
    "unit": "passes",
    "where_exists": "nowhere",
    "published": [],
    "kind": "crop",
    "activation": "silu",
    "corruptions": {"folders": {}},
    "latency": True,
    "shift": 0.2,
    "training": {"batch_size": 10},
    "params": {"bcs": {"noise_scale": 0.01}},
    "budget": {"unit": "epochs", "total": 12},
}

# Keys that change together with other keys, and values that depend on the folder.
SETS = {
    "archs.small_cnn.mean": {"archs.small_cnn.mean": [0.5], "archs.small_cnn.std": [0.5]},
    "archs.small_cnn.std": {"archs.small_cnn.mean": [0.0], "archs.small_cnn.std": [0.5]},
    "models.given.mean": {"models.given.mean": [0.5], "models.given.std": [0.5]},
    "models.given.std": {"models.given.mean": [0.0], "models.given.std": [0.5]},
    "models.given.file": {"models.given.file": "{folder}/changed.pt"},
    "models.given.arch": {"archs.wide": {"base": "small_cnn"}, "models.given.arch": "wide"},
    "models.given.zoo": {
        "models.given": {"zoo": "Carmon2019", "dataset": "digits", "objective": "at"}
    },
    "models.given.callable": {
        "models.given": {"callable": "nets:net", "dataset": "digits", "objective": "at"}
    },
    "training.synthetic_file": {"training.synthetic_file": "{folder}/own.npz"},
    "grid.1.training.synthetic_file": {"grid.1.training.synthetic_file": "{folder}/own.npz"},
    "grid.0.datasets": {"grid.0.datasets": ["digits", "own"], "tables": []},
    "grid.0.archs": {"archs.wide": {"base": "small_cnn", "width": 6}, "grid.0.archs": ["wide"]},
    "grid.1.archs": {"archs.wide": {"base": "small_cnn", "width": 6}, "grid.1.archs": ["wide"]},
    "grid.0.budget.unit": {"grid.0.budget": {"unit": "passes", "total": 60}},
    "tables.0.datasets": {"tables.0.datasets": ["own"]},
    "grid.0.where_exists": {"grid.0.where_exists": "{folder}/there"},
    "methods.other_dense.starts_from": {},
    "models.given.dataset": {"models.given.dataset": "own"},
    "datasets.own.file": {"datasets.own.file": "{folder}/changed.npz"},
    "datasets.own.base": {"datasets.own": {"base": "digits", "validation_examples": 10}},
    "methods.bcs.temperature": {"methods.bcs.temperature": 0.1, "grid.1.params": {}},
    "evaluation.selections": {"evaluation.selections": {"best_val": ["pgd"], "last": ["pgd"]}},
    "grid.1.datasets": {"grid.1.datasets": ["digits"], "tables": []},
    "grid.0.methods": {"grid.0.methods": ["dense", "other_dense", "lwm"], "tables": []},
    "grid.1.methods": {"grid.1.methods": ["dense", "other_dense"]},
    "methods.other_dense.base": {"methods.other_dense": {"base": "bcs"}},
} | {
    f"evaluation.attacks.{name}.norm": {
        f"evaluation.attacks.{name}.norm": "L2",
        f"evaluation.attacks.{name}.eps": 0.15,
    }
    for name in ("pgd", "autoattack", "transfer")
}

# The first stage that runs again when a key changes; the longest name that fits counts. A key that
# names a file has two rows; in the row with `~moved` only the name of the file changes.
KEYS = {
    "study": (
        "collect",
        "the results of another study are in another folder, where nothing exists yet",
    ),
    "title": ("figures", "it is printed"),
    "small": ("figures", "it is printed"),
    "grid": ("training", "only new networks are trained"),
    "grid.1.where_exists": ("collect", "the study no longer has the networks of the block"),
    "grid.0.methods": ("collect", "the study has fewer networks"),
    "grid.1.methods": ("collect", "the study has one network less"),
    "grid.0.where_exists": ("figures", "the file exists, and the setting is printed"),
    "grid.1.training.rst_file": ("figures", "only rst reads it; all settings are printed"),
    "grid.1.training.rst_fraction": ("figures", "only rst reads it"),
    "grid.1.training.synthetic_fraction": ("figures", "no file of synthetic images is given"),
    "datasets": ("training", ""),
    "datasets.own.label": ("figures", "it is printed"),
    "datasets.own.file~moved": ("figures", "the content decides, and the name is printed"),
    "archs": ("training", ""),
    "methods": ("training", "networks of this method, and networks that start from them"),
    "methods.other_dense.label": ("figures", "it is printed"),
    "methods.other_dense.starts_from": (
        "nothing",
        "a dense network does not start from another network",
    ),
    "methods.lwm.finetune.epochs": (
        "figures",
        "the budget of the block decides the number of epochs",
    ),
    "methods.admm": ("figures", "it is not in the grid"),
    "methods.hydra": ("figures", "it is not in the grid"),
    "models": ("training", "the external model is imported again"),
    "models.given.label": ("figures", "it is printed"),
    "models.given.file~moved": ("figures", "the content decides, and the name is printed"),
    "threat": ("training", ""),
    "training": ("training", ""),
    "training.beta": ("figures", "only trades, mart and rst read it, and their block sets it"),
    "training.rst_file": ("figures", "only rst reads it"),
    "training.rst_fraction": ("figures", "only rst reads it"),
    "training.synthetic_fraction": ("figures", "no file of synthetic images is given"),
    "evaluation": ("evaluation", ""),
    "machine": ("nothing", "no number depends on it"),
    "machine.rerun_on_code_change": ("training", "from now on the code is compared"),
    "tables": ("figures", ""),
}


def expected_of(key: str) -> str:
    parts = key.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return KEYS[next(name for name in reversed(names) if name in KEYS)][0]


def written_keys(value: Study | Block) -> set[str]:
    """The keys that a config file has for a study or for a block of its grid."""
    if isinstance(value, Study):
        return set(StudyFile.model_fields)
    return set(Grid.model_fields) - (set() if value.own_training else {"training"})


def keys_of(value: object, prefix: str = "") -> list[str]:
    """All keys of a study with defaults, down to single values."""
    parted = ("datasets", "archs", "methods", "models", ATTACKS)
    if isinstance(value, Study | Block):
        found = {name: getattr(value, name) for name in written_keys(value)}
        if isinstance(value, Study):
            found[ATTACKS] = value.attack_params
    elif isinstance(value, BaseModel):
        found = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, Mapping) and prefix in parted:
        found = value
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel | Block):
        found = {str(i): one for i, one in enumerate(value)}
    else:
        return [prefix]
    start = f"{prefix}." if prefix else ""
    return [key for name, inner in found.items() for key in keys_of(inner, f"{start}{name}")]


def put(data: dict, key: str, value: object) -> None:
    *outer, last = key.split(".")
    for name in outer:
        if isinstance(data, list):
            data = data[int(name)]
        else:
            data[name] = {} if data.get(name) is None else data[name]
            data = data[name]
    data[last] = value


def get(study: Study, key: str) -> object:
    value, names = study, key.split(".")
    if key.startswith(f"{ATTACKS}."):
        value, names = study.attack_params, names[2:]
    for name in names:
        if isinstance(value, tuple):
            value = value[int(name)]
        else:
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


def changes_of(study: Study, key: str, folder: Path) -> dict[str, object]:
    if key in SETS:
        found = SETS[key]
    else:
        old, name = get(study, key), key.rpartition(".")[2]
        new = VALUES.get(key, VALUES.get(name, old + 1 if isinstance(old, int | float) else None))
        assert new is not None, f"{key}: in no row of this table"
        found = {key: new(old) if callable(new) else new}
    return {
        name: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
        for name, value in found.items()
    }


def test_every_key_reruns_the_stage_in_the_table(tmp_path, monkeypatch):
    """One loop over the keys of the study, so that no key is forgotten."""
    data = study_data(tmp_path)
    study = loading.validate(data, "table")
    before, found, expected = plans(study), {}, {}
    for key in keys_of(study):
        changed = copy.deepcopy(data)
        for name, value in changes_of(study, key, tmp_path).items():
            put(changed, name, value)
        found[key] = first_changed(before, plans(loading.validate(changed, "table")))
        expected[key] = expected_of(key)
    assert found == expected
    assert len(found) > 150


@pytest.mark.parametrize("key", ["datasets.own.file", "models.given.file"])
def test_content_of_a_file_counts_and_its_name_does_not(key, tmp_path):
    data = study_data(tmp_path)
    before = plans(loading.validate(data, "table"))
    path = Path(get(loading.validate(data, "table"), key))
    moved = path.rename(path.with_stem("moved"))
    put(data, key, str(moved))
    assert first_changed(before, plans(loading.validate(data, "table"))) == "figures"
    moved.write_bytes((tmp_path / f"changed{path.suffix}").read_bytes())
    assert first_changed(before, plans(loading.validate(data, "table"))) == "training"


def test_changed_published_numbers_redraw_the_figures(tmp_path):
    data = study_data(tmp_path)
    before = plans(loading.validate(data, "table"))
    (tmp_path / "paper.csv").write_text("other numbers")
    assert first_changed(before, plans(loading.validate(data, "table"))) == "figures"


def test_changed_captions_redraw_the_figures(tmp_path):
    study = loading.validate(study_data(tmp_path), "table")
    caption = tmp_path / "main.rst"
    caption.write_text("one")
    before = fingerprints.figures(study, [caption]).plan
    caption.write_text("another")
    assert fingerprints.figures(study, [caption]).plan != before


def evaluated(study, cell):
    return fingerprints.evaluation(study, cell, "last")


def test_fingerprint_of_an_external_model_contains_file_arch_and_data(tmp_path):
    data = study_data(tmp_path)
    study = loading.validate(data, "table")
    [cell] = [cell for cell in study.cells() if cell.method == "given"]
    before = (
        fingerprints.training(study, cell).plan,
        fingerprints.evaluation(study, cell, "last").plan,
    )
    for key, value in {
        "archs.small_cnn.width": (6, True),
        "datasets.digits.split_seed": (1, True),
        "models.given.match": ("order", True),
        "threat.eps": (0.12, False),
    }.items():
        changed = copy.deepcopy(data)
        put(changed, key, value[0])
        other = loading.validate(changed, "table")
        assert (fingerprints.training(other, cell).plan != before[0]) == value[1], key
        assert evaluated(other, cell).plan != before[1], key


def test_another_surrogate_changes_the_evaluation(tmp_path):
    """The weights of the surrogate decide the outcome of a transfer attack."""
    data = study_data(tmp_path)
    study = loading.validate(data, "table")
    [cell] = [cell for cell in study.cells() if cell.method == "given"]
    before = fingerprints.evaluation(study, cell, "best_val").plan
    alone = fingerprints.evaluation(study, cell, "last").plan
    data["methods"]["dense"]["pretrain"]["lr"] = 0.07
    study = loading.validate(data, "table")
    assert fingerprints.evaluation(study, cell, "best_val").plan != before
    assert fingerprints.evaluation(study, cell, "last").plan == alone


# ---------------------------------------------------------------- code

# The first stage that runs again when a file is edited and rerun_on_code_change is true.
# The study of this test uses the methods dense, lwm and bcs, the data sets digits and npz, the arch
# small_cnn and the attacks clean, pgd, autoattack and transfer. The code of collect
# and figures always counts.
FILES = {
    "training": """
        baselines/__init__ baselines/dense baselines/lwm method/*
        robsparse/* robsparse/base/* robsparse/schema/* robsparse/records/* robsparse/study/*
        robsparse/compute/* robsparse/kernels/* robsparse/sparsity/* robsparse/thirdparty/*
        robsparse/models/*
        robsparse/datasets/__init__ robsparse/datasets/_arrays robsparse/datasets/digits
        robsparse/datasets/npz robsparse/networks/* robsparse/fast/* robsparse/training/*
    """,
    "evaluation": """
        eval/__init__ eval/autoattack eval/clean eval/pgd eval/transfer robsparse/evaluation/*
        robsparse/datasets/_corruptions robsparse/networks/compact
        robsparse/records/evaluation_record robsparse/records/rows robsparse/study/targets
    """,
    "collect": "robsparse/collection/*",
    "figures": """
        figures/* figures/data/* figures/page/* figures/plots/* figures/tables/* figures/text/*
    """,
    "nothing": """
        robsparse/__main__ robsparse/cli/* robsparse/tools/* robsparse/tools/bench/*
        robsparse/api/* robsparse/study/checks
        robsparse/base/gpus robsparse/base/parent robsparse/base/runs
        robsparse/study/loading robsparse/study/resolving
        robsparse/schema/study_file robsparse/schema/json_schema figures/data/agreement
        robsparse/training/dynamic
        robsparse/evaluation/fast_minimum_norm robsparse/models/resnet robsparse/models/vgg
        robsparse/models/wideresnet robsparse/models/preactresnet
        baselines/* eval/* robsparse/datasets/*
    """,
}


def stage_of(file: str) -> str:
    """The stage of a file in FILES, by its name or else by the pattern of its folder."""
    name, folder = file.partition(".")[0], f"{file.rpartition('/')[0]}/*"
    for wanted in (name, folder):
        for stage, names in FILES.items():
            if wanted in names.split():
                return stage
    return "in no row of this table"


def files_of_the_package(repository: Path) -> dict[str, Path]:
    """Paths of all code (Python and C) and of the style of plots and page, by names in FILES."""
    found = {}
    for package in ("robsparse", "method", "baselines", "eval", "figures"):
        paths = (repository / package).rglob("*.py")
        found |= {p.relative_to(repository).as_posix(): p for p in paths}
    figures = repository / "figures"
    looks = (p for end in ("mplstyle", "j2", "css", "js") for p in figures.rglob(f"*.{end}"))
    compiled = (repository / "robsparse").rglob("*.[ch]")
    found |= {path.relative_to(repository).as_posix(): path for path in (*looks, *compiled)}
    return {name: path for name, path in found.items() if not name.startswith("robsparse/method/")}


@pytest.fixture
def edit(monkeypatch):
    """edit(path): from now on, only this file has other content."""
    source, read, edited = source_code._source, source_code.read, []

    def parsed(path):
        found = source(path)
        return dataclasses.replace(found, digest="another") if path.resolve() in edited else found

    def forget():
        source_code.digest.cache_clear()

    def edit(path):
        edited[:] = [path.resolve()]
        forget()

    monkeypatch.setattr(source_code, "_source", parsed)
    monkeypatch.setattr(source_code, "read", lambda p: read(p) + b"#" * (p.resolve() in edited))
    yield edit
    forget()


def test_every_file_reruns_the_stage_in_the_table(repository, tmp_path, edit):
    data = study_data(tmp_path)
    data["machine"]["rerun_on_code_change"] = True
    study = loading.validate(data, "table")
    files = files_of_the_package(repository)
    before, found = plans(study), {}
    for name, path in files.items():
        edit(path)
        found[name] = first_changed(before, plans(study))
    assert found == {name: stage_of(name) for name in files}


def test_a_change_of_code_reruns_only_figures_without_rerun_on_code_change(
    repository, tmp_path, edit
):
    study = loading.validate(study_data(tmp_path), "table")
    before, kept = plans(study), fingerprints.training(study, study.cells()[0]).code
    edit(repository / "robsparse" / "training" / "loop.py")
    assert first_changed(before, plans(study)) == NOTHING
    assert fingerprints.training(study, study.cells()[0]).code != kept
    edit(repository / "figures" / "report.py")
    assert first_changed(before, plans(study)) == "figures"


def test_another_library_reruns_all_with_rerun_on_code_change(tmp_path, monkeypatch):
    data = study_data(tmp_path)
    for counted in (False, True):
        data["machine"]["rerun_on_code_change"] = counted
        study = loading.validate(data, "table")
        before = plans(study)
        with monkeypatch.context() as patch:
            patch.setattr(fingerprints.provenance, "libraries", lambda: "torch=9")
            expected = "training" if counted else "collect"
            assert first_changed(before, plans(study)) == expected


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Other words."""\nimport os\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n', True),
        ("import os  # why\n\ndef f( x ):\n    # a remark\n    return (x + 1)\n", True),
        ("import os\ndef f(x):\n    return x + 2\n", False),
        ("import os\ndef f(x, y=0):\n    return x + 1\n", False),
        ("import sys\ndef f(x):\n    return x + 1\n", False),
        ("import os\ndef f(x):\n    return x - 1\n", False),
        ("import os\ndef f(x):\n    return 1 + x\n", False),
        ('import os\ndef f(x):\n    return "x + 1"\n', False),
    ],
)
def test_comments_docstrings_and_layout_do_not_count_as_code(text, same, tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("import os\n\n\ndef f(x):\n    return x + 1\n")
    other.write_text(text)
    sums = [source_code._source(path).digest for path in (one, other)]
    assert (sums[0] == sums[1]) == same


IMPORTS = {
    "import own.inner": "own.inner",
    "import own.inner as i": "own.inner",
    "from own import inner": "own.inner",
    "from own.inner import anything": "own.inner",
    "from . import inner": "own.inner",
    "from .inner import anything": "own.inner",
    "def f():\n    from own import inner": "own.inner",
    "import importlib\nm = importlib.import_module('own.inner')": "own.inner",
    "import neighbour": "neighbour",
    "from robsparse.sparsity import masks": "robsparse.sparsity.masks",
}


def test_entry_that_is_not_a_module_is_refused():
    with pytest.raises(LookupError, match=r"robsparse\.nowhere: there is no such module"):
        source_code.digest("robsparse.nowhere")


def closure_of(*entries):
    """The closure without the caches of this process."""
    cached = (source_code.closure, source_code._places, source_code._imported, source_code.digest)
    for function in cached:
        function.cache_clear()
    found = source_code.closure(*entries)
    for function in cached:
        function.cache_clear()
    return found


@pytest.mark.parametrize("line", IMPORTS)
def test_imports_of_all_forms_are_found(line, tmp_path, monkeypatch):
    """In a package of the user, with another module in the same folder as the package."""
    (tmp_path / "own").mkdir()
    for name in ("own/__init__", "own/inner", "own/outside", "neighbour"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "own" / "net.py").write_text(f"import torch, json\n{line}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = closure_of("own.net")
    assert IMPORTS[line] in found
    assert "own" in found
    assert "own.outside" not in found
    assert not any(name.startswith(("torch", "json")) for name in found)


def test_module_of_a_nested_package_finds_modules_beside_the_package(tmp_path, monkeypatch):
    (tmp_path / "own" / "deep").mkdir(parents=True)
    for name in ("own/__init__", "own/deep/__init__", "neighbour"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "own" / "deep" / "net.py").write_text("import neighbour\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "neighbour" in closure_of("own.deep.net")


def test_installed_packages_are_not_followed(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    site.mkdir()
    (site / "installed_net.py").write_text("import installed_library\n")
    (site / "installed_library.py").write_text("")
    monkeypatch.syspath_prepend(site)
    assert set(closure_of("installed_net")) == {"installed_net"}


def test_compiled_module_has_no_source(tmp_path, monkeypatch):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"compiled_net{suffix}").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert closure_of("compiled_net") == {}


def test_digest_of_a_folder_depends_on_its_files_and_their_names(tmp_path):
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(b"one")
    digests = [fingerprints.content(str(folder))]
    (folder / "cat" / "1.png").write_bytes(b"other")
    digests.append(fingerprints.content(str(folder)))
    (folder / "cat" / "1.png").rename(folder / "cat" / "2.png")
    digests.append(fingerprints.content(str(folder)))
    assert len(set(digests)) == len(digests)


# ---------------------------------------------------------------- the document


def document() -> str:
    """The text of docs/staleness.md."""
    keys = [f"| `{key}` | {stage} | {why} |" for key, (stage, why) in KEYS.items()]
    files = [f"| {stage} | {' '.join(names.split())} |" for stage, names in FILES.items()]
    return "\n".join([TOP, *keys, MIDDLE, *files, ""])


TOP = """\
# What runs again after which change

`robsparse/study/fingerprints.py` computes the fingerprints of a network, an evaluation, the tables
and the figures: digests of everything that decides them. The workflow runs a job again if its
fingerprint has changed. `python tests/unit/test_fingerprints.py` writes this page from its tables.
The tests in this file change every key of a study and every file of the package, and check for
which jobs the parameters change that Snakemake compares.

Some things change no fingerprint: the name and the folder of a config, the place of data and
weights, and comments and docstrings in Python code. The content of a file that a config names does
change it. If `evaluation.selections` gets `best_clean`, networks that were trained without it are
trained again, because training did not save these weights.

The stages are training, evaluation, collect and figures. If a stage runs again, all later stages
also run again. If several names in the table fit a key, the longest one counts. In a row with
`~moved`, the file has another name and the same content.

| key of a study | first stage that runs again | why |
|---|---|---|"""

MIDDLE = """
With `machine.rerun_on_code_change: true`, a change of the code or of a library also starts jobs.
Otherwise the records contain the version of the code that made them, and `collect` says which rows
come from other code (columns `code_digest` and `other_code` of `results.csv`). Tables and figures
are made again after every change of their code. The cache of an evaluation and resume states are
never used after a change of the code. The code of a method, attack, data set or architecture
counts only if the study uses it. The study of the table below uses dense, lwm and bcs; digits and
npz; small_cnn; clean, pgd, autoattack and transfer.

| first stage that runs again | files (without .py; `*`: the other files of the folder) |
|---|---|"""


def test_document_shows_the_tables(repository):
    assert (repository / "docs" / "staleness.md").read_text() == document()


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "staleness.md").write_text(document())
