"""Where networks come from: one answer for training, workflow, evaluation and figures."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from robsparse import evaluation, external, models, records, registry, weights
from robsparse.cells import Layout
from robsparse.sources import Source, Target

COMMON = {"dataset": "digits", "objective": "at"}


@pytest.fixture
def from_everywhere(study_data, load_study, tmp_path):
    """A study with networks of every source, and its layout."""
    torch.manual_seed(3)
    params = registry.entry("arch", "small_cnn").params(width=4)
    torch.save(models.build("small_cnn", params, (1, 8, 8), 10).state_dict(), tmp_path / "w.pt")
    study_data["archs"] = {"small_cnn": {"width": 4}}
    study_data["models"] = {
        "given": COMMON | {"file": str(tmp_path / "w.pt"), "arch": "small_cnn"},
        "made": COMMON | {"callable": "own_nets:linear"},
        "fetched": COMMON | {"zoo": "Sehwag2020Hydra"},
    }
    study_data["evaluation"] |= {"n_examples": 12, "batch_size": 5}
    study_data["evaluation"]["attacks"]["pgd"] = {"steps": 2, "restarts": 1}
    return load_study(study_data), Layout(tmp_path / "run")


@pytest.fixture
def own_nets(tmp_path, monkeypatch):
    """A module of the user, importable in this test alone: own_nets(text)."""

    def write(text):
        (tmp_path / "own_nets.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own_nets", raising=False)

    yield write
    sys.modules.pop("own_nets", None)


LINEAR = """
import torch
from torch import nn


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def cell_of(study, method):
    [cell] = [cell for cell in study.cells() if cell.method == method]
    return cell


def test_each_network_says_where_it_comes_from(from_everywhere, tmp_path):
    study, _ = from_everywhere
    file = tmp_path / "w.pt"
    assert study.source("given") == Source("file", str(file))
    assert study.source("made") == Source("callable", "own_nets:linear")
    assert study.source("fetched") == Source("zoo", "Sehwag2020Hydra")
    assert study.source("bcs") == Source()
    found = {name: study.source(name) for name in ("given", "made", "fetched", "bcs")}
    assert [source.foreign for source in found.values()] == [False, True, True, False]
    assert [source.external for source in found.values()] == [True, True, True, False]
    assert [study.is_external(name) for name in found] == [True, True, True, False]
    assert found["given"].file == file
    assert found["made"].file is found["fetched"].file is found["bcs"].file is None
    assert str(found["made"]) == "callable own_nets:linear"


def test_a_job_waits_for_the_files_that_its_network_comes_from_and_no_others(from_everywhere):
    study, layout = from_everywhere
    dense = cell_of(study, "dense")
    waits = {cell.method: study.inputs(cell, layout) for cell in study.cells()}
    assert waits == {
        "bcs": [],
        "dense": [],
        "lwm": [layout.model(dense, "last"), layout.training(dense)],
        "given": [Path(study.models["given"].file)],
        "made": [],
        "fetched": [],
    }


def test_targets_never_share_a_place(tmp_path):
    made = Target.as_built(tmp_path, Source("callable", "nets:linear"))
    assert made.weights is None
    assert made.record == tmp_path / "callable" / "nets.linear.evaluation.json"
    given = Target.of_file(tmp_path / "w.pt", "order")
    assert (given.weights, given.match) == (tmp_path / "w.pt", "order")
    assert given.record.parent == given.flags.parent == tmp_path


def test_in_a_study_foreign_code_is_attacked_as_it_is(from_everywhere, own_nets, monkeypatch):
    own_nets(LINEAR)
    study, layout = from_everywhere
    folded = {}

    def attack(model, *words, **options):
        folded[len(folded)] = options["folded"]
        return original(model, *words, **options)

    original = evaluation.attack_model
    monkeypatch.setattr(evaluation, "attack_model", attack)
    for name in ("given", "made"):
        cell = cell_of(study, name)
        external.take_in(study, cell, layout)
        evaluation.evaluate_cell(study, cell, "last", layout, settings_digest="", device="cpu")
    assert folded == {0: True, 1: False}


def test_record_of_a_network_without_a_file_names_its_weights_all_the_same(
    from_everywhere, own_nets, tmp_path
):
    own_nets(LINEAR)
    study, layout = from_everywhere
    cell = cell_of(study, "made")
    target = Target.as_built(tmp_path, study.source("made"))
    path = evaluation.evaluate_cell(
        study, cell, "last", layout, settings_digest="", target=target, device="cpu"
    )
    row = records.read_record(path).rows[0]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert row.model_checksum == weights.checksum(network.state_dict())
    assert row.model_bytes == 4 * (640 + 10)
    with torch.no_grad():
        network[1].weight[0, 0] += 1
    assert row.model_checksum != weights.checksum(network.state_dict())
