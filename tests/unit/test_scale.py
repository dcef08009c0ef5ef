"""Work grows with the size of a study at most in proportion. Calls are counted, not seconds."""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import made_up
from robsparse.base.errors import UsageError
from robsparse.cli.arguments import load_cell
from robsparse.figures.data import compare, summary, tidy
from robsparse.figures.tables import study_tables
from robsparse.study import fingerprints, loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

JOB = "digits/small_cnn/bcs/at/s0.9000/seed1"


class Calls:
    """Counts the calls of a method."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.calls, original = 0, getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)


def grid(seeds: Sequence[int] = (0, 1), **changes: Any) -> dict[str, Any]:
    """A study with a transfer attack. Nothing in it is trained."""
    return {
        "study": "scale",
        "title": "Scale",
        "grid": {
            "datasets": ["digits"],
            "archs": ["small_cnn"],
            "objectives": ["at"],
            "methods": ["dense", "lwm", "bcs"],
            "sparsities": [0.9, 0.99],
            "seeds": list(seeds),
        }
        | changes,
        "threat": {"eps": 0.1},
        "training": {"batch_size": 8, "crafting": {"step_size": 0.05}},
        "evaluation": {"n_examples": 10, "selections": {"last": ["clean", "pgd", "transfer"]}},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def one(data: dict[str, Any]) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(data))
        return path

    return one


LARGER = {
    "sparsities": {"sparsities": [0.9, *(share / 1000 for share in range(1, 900))]},
    "archs": {"archs": ["small_cnn", "small_resnet", "resnet18", "resnet34", "resnet50"]},
    "objectives": {"objectives": ["at", "trades", "mart", "natural"]},
    "methods": {"methods": ["dense", "lwm", "bcs", "hydra", "admm", "rigl", "set", "snip"]},
}


def cells_of_a_job(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of cells that a job makes until training or attacks begin."""
    with monkeypatch.context() as patch:
        made = Calls(patch, Cell, "__post_init__")
        arguments = argparse.Namespace(config=path, cell=JOB, results=Path("results"))
        study, layout, cell = load_cell(arguments)
        study.inputs(cell, layout)
        fingerprints.training(study, cell)
        fingerprints.evaluation(study, cell, "last")
        return made.calls


@pytest.mark.parametrize("axis", [*LARGER])
def test_a_job_makes_as_many_cells_in_a_study_of_any_size(axis, write, monkeypatch):
    small = cells_of_a_job(write(grid()), monkeypatch)
    large = cells_of_a_job(write(grid(**LARGER[axis])), monkeypatch)
    assert small == large < 20


def test_a_job_makes_one_more_cell_for_each_seed_of_its_surrogate(write, monkeypatch):
    counts = [cells_of_a_job(write(grid(range(seeds))), monkeypatch) for seeds in (2, 40)]
    assert counts[1] - counts[0] == 38


def test_cells_of_a_check_grow_in_proportion_to_the_study(write, monkeypatch):
    made = Calls(monkeypatch, Cell, "__post_init__")
    each = []
    for seeds in (5, 20, 80):
        made.calls = 0
        networks = len(loading.load(write(grid(range(seeds)))).cells())
        each.append(made.calls / networks)
    assert max(each) < 1.2 * min(each)


def test_settings_of_methods_are_read_once_for_all_networks(write, monkeypatch):
    dumped = Calls(monkeypatch, BaseModel, "model_dump")
    calls = []
    for seeds in (2, 30):
        study = loading.load(write(grid(range(seeds))))
        dumped.calls = 0
        fingerprints.collected(study)
        calls.append(dumped.calls - len(study.cells()))  # one for the evaluation of each network
    assert calls[0] == calls[1]


# ------------------------------------------------ the same results as with a list of all networks


def planned_slowly(study: Study) -> list[Cell]:
    """All trained cells of the study, block by block."""
    found = {}
    for block in study.blocks:
        for dataset in block.datasets:
            for arch in block.archs:
                for objective in block.objectives:
                    for seed in block.seeds:
                        for method in block.methods:
                            for sparsity in (0.0,) if method == "dense" else block.sparsities:
                                if method in ("lwm", "hydra"):
                                    found[Cell(dataset, arch, "dense", objective, 0, seed)] = None
                                cell = Cell(dataset, arch, method, objective, sparsity, seed)
                                found[cell] = None
    return list(found)


def surrogate_slowly(study: Study, cell: Cell, method: str) -> Cell | None:
    """The surrogate by the rule in the docstring of Study.surrogate, from a list of all cells."""
    found = [
        other
        for sparsity in dict.fromkeys((0.0, cell.sparsity))
        for other in study.cells()
        if (other.dataset, other.method, other.sparsity) == (cell.dataset, method, sparsity)
        and other != cell
    ]
    return min(
        found,
        key=lambda other: (
            other.arch != cell.arch,
            other.objective != cell.objective,
            other.seed <= cell.seed,
            other.seed,
        ),
        default=None,
    )


def some(*names: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)


BLOCK = st.fixed_dictionaries(
    {
        "datasets": st.just(["digits"]),
        "archs": some("small_cnn", "small_resnet"),
        "objectives": some("at", "trades", "mart"),
        "methods": some("dense", "lwm", "bcs", "hydra"),
        "sparsities": some(0.5, 0.9, 0.99),
        "seeds": some(0, 1, 3, 7),
    }
)


@given(blocks=st.lists(BLOCK, min_size=1, max_size=3))
def test_plan_and_surrogates_are_those_of_a_list_of_all_networks(blocks):
    data = grid() | {"grid": blocks}
    data["evaluation"] = {"n_examples": 10, "selections": {"last": ["clean"]}}
    study = loading.validate(data, "study.yaml")
    cells = study.cells()
    assert cells == planned_slowly(study)
    everywhere = [
        Cell("digits", arch, method, objective, sparsity, seed)
        for arch in ("small_cnn", "small_resnet")
        for method in ("dense", "lwm", "bcs", "hydra")
        for objective in ("at", "trades", "mart")
        for sparsity in (0.0, 0.5, 0.9, 0.99)
        for seed in (0, 1, 3, 7)
    ]
    assert [cell for cell in everywhere if cell in study.planned] == sorted(
        cells, key=everywhere.index
    )
    for cell in cells[::3]:
        for method in study.methods:
            expected = surrogate_slowly(study, cell, method)
            if expected is None:
                with pytest.raises(UsageError, match=f"no network of '{method}' as surrogate"):
                    study.surrogate(cell, method)
            else:
                assert study.surrogate(cell, method) == expected


def test_a_job_refuses_what_is_wrong_with_its_own_cell(write):
    """Two blocks give the cell different settings; other cells of the study are not looked at."""
    blocks = [grid()["grid"], grid(methods=["bcs"], seeds=[1])["grid"]]
    blocks[1]["params"] = {"bcs": {"train": {"epochs": 3}}}
    path = write(grid() | {"grid": blocks})

    def load(key: str) -> Cell:
        return load_cell(argparse.Namespace(config=path, cell=key, results=Path("results")))[2]

    assert load(JOB.replace("seed1", "seed0")).seed == 0
    with pytest.raises(UsageError, match=f"study.yaml: grid: the cell {JOB} is in two blocks"):
        load(JOB)
    with pytest.raises(UsageError, match=r"is not part of the study 'scale'.*seed1"):
        load(JOB.replace("seed1", "seed11"))
    with pytest.raises(UsageError, match="two blocks"):
        loading.load(path)


def test_a_job_without_a_surrogate_is_refused_in_one_line(write):
    data = grid(seeds=[1])
    data["evaluation"]["attacks"] = {"transfer": {"surrogate": "bcs"}}
    arguments = argparse.Namespace(config=write(data), cell=JOB, results=Path("results"))
    with pytest.raises(UsageError, match=r"^[^\n]*study.yaml: evaluation.attacks: no network of"):
        load_cell(arguments)


# ------------------------------------------------ figures


def test_figures_read_the_outcomes_of_a_network_twice_and_keep_no_pictures(tmp_path, monkeypatch):
    """Once for the check of the collected tables, and once for all tables and plots."""
    study = made_up.load(tmp_path, seeds=[0, 1, 2])
    layout = made_up.MadeUp(study, Layout(tmp_path / "made_up"), made_up.correct).write()
    read, original = Counter(), tidy.read_flags

    def counted(path: Path, pictures: bool) -> dict[str, Any]:
        read[path] += 1
        assert not pictures
        return original(path, pictures)

    monkeypatch.setattr(tidy, "read_flags", counted)
    tables = tidy.read(layout.root)
    tidy.check(tables, layout, layout.root)
    assert set(read.values()) == {1}
    material = summary.make_material(study, layout, tables)
    [group] = tidy.groups(study)
    for _ in range(2):
        compare.compare(material, group)
        compare.ranks(material)
        study_tables.main(material, group)
    assert set(read.values()) == {2}
    assert len(read) == 2 * len(study.cells())  # selections
