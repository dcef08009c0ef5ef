"""Sources of networks, for training, workflow, evaluation and figures."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from robsparse import datasets, models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum
from robsparse.cli.main import main
from robsparse.collection import overlap
from robsparse.evaluation import evaluate
from robsparse.kernels.library import instructions
from robsparse.networks import external, weights
from robsparse.records.evaluation_record import read_record
from robsparse.schema.external import Source
from robsparse.schema.threat import Threat
from robsparse.study.cells import Layout
from robsparse.study.loading import load
from robsparse.study.planned import Plan
from robsparse.study.targets import Target

COMMON = {"dataset": "digits", "objective": "at"}


@pytest.fixture
def from_everywhere(study_data, load_study, tmp_path):
    """A study with networks from every source, and its layout."""
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
    """own_nets(text) writes a module of the user, which only this test can import."""

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
NETS = (
    LINEAR
    + """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.last = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x):
        return self.last(x.flatten(1))


def drawn():
    torch.seed()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Hidden(Net):
    def __init__(self):
        super().__init__()
        torch.seed()
        self.scale = torch.rand(10)

    def forward(self, x):
        return super().forward(x) * self.scale


class Noisy(Net):
    def forward(self, x):
        torch.seed()
        return super().forward(x + 0.1 * torch.rand_like(x))


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.matrix = nn.Parameter(torch.randn(64, 10) / 8)

    def forward(self, x):
        return x.flatten(1) @ self.matrix


class Raises(Net):
    def forward(self, x):
        raise ValueError("two\\nlines")


class Leaves(Net):
    def forward(self, x):
        sys.exit(0)


class Trains(Net):
    def forward(self, x):
        self.last.train()
        return super().forward(x)


class Tires(Net):
    def forward(self, x):
        self.calls += 1
        if self.calls > 20:
            raise KeyError("tired")
        return super().forward(x)


class Alone(Net):
    def forward(self, x):
        if len(x) == 1:
            raise IndexError("one image")
        return super().forward(x)


class Bfloat(Net):
    def __init__(self):
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        return self.last(x.flatten(1).bfloat16()).float()


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Net()

    def forward(self, x):
        return self.module(x)


class Normed(Net):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.last)


class Masked(Net):
    def __init__(self):
        super().__init__()
        mask = torch.zeros(10)
        mask[9] = -float("inf")
        self.register_buffer("mask", mask)

    def forward(self, x):
        return super().forward(x) + self.mask.clamp(min=-1e6)


class Extra(Net):
    def get_extra_state(self):
        return {"more": "than tensors"}

    def set_extra_state(self, state):
        pass
"""
).replace("import torch\n", "import sys\n\nimport torch\n", 1)


def cell_of(study, method):
    [cell] = [cell for cell in study.cells() if cell.method == method]
    return cell


def test_each_network_has_its_source(from_everywhere, tmp_path):
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


def test_inputs_of_a_job_are_the_network_that_it_starts_from_and_no_file_of_the_user(
    from_everywhere,
):
    study, layout = from_everywhere
    dense = cell_of(study, "dense")
    waits = {cell.method: study.inputs(cell, layout) for cell in study.cells()}
    assert waits == {
        "bcs": [],
        "dense": [],
        "lwm": [layout.model(dense, "last"), layout.training(dense)],
        "given": [],  # what is in the file decides, not its name and date
        "made": [],
        "fetched": [],
    }


def test_external_model_is_dense_if_its_sparsity_is_zero(from_everywhere, study_data, load_study):
    study_data["models"]["sparse"] = study_data["models"]["given"] | {"sparsity": 0.5}
    study = load_study(study_data)
    assert study.is_dense("given")
    assert not study.is_dense("sparse")
    assert [study.sparsity_of(name, 0.9) for name in ("given", "sparse", "bcs")] == [0, 0.9, 0.9]


def test_targets_have_different_paths(tmp_path):
    threat = Threat(norm="Linf", eps="8/255")
    made = Target.as_built(tmp_path, Source("callable", "nets:linear"), threat)
    assert made.weights is None
    assert made.record == tmp_path / "callable" / "nets.linear.Linf-0.03137.evaluation.json"
    given = Target.beside_file(tmp_path / "w.pt", "order", threat)
    assert (given.weights, given.match) == (tmp_path / "w.pt", "order")
    assert given.record.parent == given.flags.parent == tmp_path
    other = Target.beside_file(tmp_path / "w.pt", "order", Threat(norm="L2", eps=0.5))
    assert other.record == tmp_path / "w.pt.L2-0.5.evaluation.json"
    assert {other.flags, other.cache}.isdisjoint({given.flags, given.cache})


def test_foreign_code_of_a_study_is_attacked_unchanged(from_everywhere, own_nets, monkeypatch):
    own_nets(LINEAR)
    study, layout = from_everywhere
    folded = {}

    def attack(model, *words, **options):
        folded[len(folded)] = options["folded"]
        return original(model, *words, **options)

    original = evaluate.attack_model
    monkeypatch.setattr(evaluate, "attack_model", attack)
    for name in ("given", "made"):
        cell = cell_of(study, name)
        external.import_network(study, cell, layout)
        path = evaluate.evaluate_cell(study, cell, "last", layout, device="cpu")
        used = {(row.attacked_on, row.kernels) for row in read_record(path).rows}
        assert used == {("view" if name == "given" else "network", instructions())}
    assert folded == {0: True, 1: False}


def test_record_of_a_network_without_a_file_has_a_checksum_of_its_weights(
    from_everywhere, own_nets, tmp_path
):
    own_nets(LINEAR)
    study, layout = from_everywhere
    cell = cell_of(study, "made")
    target = Target.as_built(tmp_path, study.source("made"), study.threat)
    path = evaluate.evaluate_cell(study, cell, "last", layout, target=target, device="cpu")
    row = read_record(path).rows[0]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert row.model_checksum == weights.checksum(network.state_dict())
    assert row.model_bytes == 4 * (640 + 10)
    with torch.no_grad():
        network[1].weight[0, 0] += 1
    assert row.model_checksum != weights.checksum(network.state_dict())


# ---------------------------------------------------------------- its row in the table


def archs_of(study):
    return {cell.method: cell.arch for cell in study.cells() if study.source(cell.method).foreign}


def test_foreign_code_is_in_the_table_of_its_data_and_objective(
    from_everywhere, study_data, load_study
):
    study, _ = from_everywhere
    assert archs_of(study) == {"made": "small_cnn", "fetched": "small_cnn"}
    study_data["models"]["made"]["objective"] = "trades"
    study_data["grid"]["archs"].append("small_resnet")
    del study_data["archs"]
    assert archs_of(load_study(study_data)) == {"made": "elsewhere", "fetched": "elsewhere"}
    study_data["models"]["fetched"]["arch"] = "small_resnet"
    assert archs_of(load_study(study_data)) == {"made": "elsewhere", "fetched": "small_resnet"}
    study_data["models"]["fetched"]["arch"] = "small_resnt"
    with pytest.raises(
        UsageError, match=r"models.fetched.arch = .*; nearest match: 'small_resnet'"
    ):
        load_study(study_data)


# ---------------------------------------------------------------- from import to record


@pytest.fixture
def by_hand(own_nets, study_data, tmp_path, monkeypatch, capsys):
    """by_hand(command, name) runs a command on a study with only the function `name`."""
    own_nets(NETS)
    monkeypatch.chdir(tmp_path)
    del study_data["grid"], study_data["methods"], study_data["archs"]
    study_data["evaluation"] |= {"n_examples": 12, "batch_size": 5}
    study_data["evaluation"]["sanity_checks"] = {"n_examples": 5, "queries": 5}
    study_data["evaluation"]["attacks"] = {"pgd": {"steps": 2, "restarts": 1}}

    def run(command, name, **more):
        study_data["models"] = {"made": COMMON | {"callable": f"own_nets:{name}"} | more}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study_data))
        cell = cell_of(load(path), "made")
        where = {"train": ["--cell", cell.key], "collect": [], "figures": []}
        code = main([command, str(path), *where.get(command, ["--cell", cell.key])])
        message = capsys.readouterr()
        return code, message.err.splitlines(), message.out

    study_data["evaluation"]["selections"] = {"best_val": ["clean", "pgd"]}
    return run


def rows_of(tmp_path):
    [path] = (tmp_path / "results").rglob("best_val.json")
    return read_record(path).rows


WHOLE = ["linear", "Net", "Bfloat", "Wrapped", "Normed", "Masked", "Matrix", "Noisy"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_network_of_a_function_is_imported_and_recorded(name, by_hand, tmp_path):
    assert by_hand("train", name)[:2] == (0, [])
    code, message, _ = by_hand("evaluate", name)
    assert (code, message) == (0, [])
    rows = rows_of(tmp_path)
    assert [row.attack for row in rows] == ["clean", "pgd"]
    assert {row.origin for row in rows} == {f"callable own_nets:{name}"}
    assert rows[0].prunable == (0 if name == "Matrix" else 640)
    [file] = tmp_path.rglob("best_val.safetensors")
    assert rows[0].model_checksum == file_checksum(file)
    assert by_hand("collect", name)[0] == 0
    assert by_hand("figures", name)[:2] == (0, [])
    table = (tmp_path / "results" / "tiny" / "tables" / "main.md").read_text()
    assert f"made (callable own_nets:{name})" in table


def test_random_weights_of_a_function_are_those_of_the_import(by_hand, tmp_path):
    assert by_hand("train", "drawn")[0] == 0
    found = []
    for _ in range(2):
        assert by_hand("evaluate", "drawn")[:2] == (0, [])
        [flags] = tmp_path.rglob("*.flags.npz")
        with np.load(flags) as stored:
            found.append(stored["clean.all"])
        assert "the imported weights are attacked" in rows_of(tmp_path)[0].origin
    [file] = tmp_path.rglob("best_val.safetensors")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    weights.load_into(network, file)
    study = load(tmp_path / "study.yaml")
    splits = datasets.load("digits", study.datasets["digits"])
    right = network(splits.test.x_NCHW[:12]).argmax(1) == splits.test.y_N[:12]
    assert all(flags.tolist() == right.tolist() for flags in found)


def test_state_outside_the_state_dict_is_an_error_before_any_attack(by_hand, tmp_path):
    assert by_hand("train", "Hidden")[0] == 0
    code, [line], out = by_hand("evaluate", "Hidden")
    assert code == 2
    assert "its outputs are not those at its import" in line
    assert "correct" not in out
    assert not list(tmp_path.rglob("best_val.json"))


REFUSED = {
    "Raises": "network: fails on 2 images of shape (1, 8, 8) (ValueError: two lines)",
    "Leaves": "network: fails on 2 images of shape (1, 8, 8) (SystemExit: 0)",
    "Alone": "network: fails on 1 images of shape (1, 8, 8) (IndexError: one image)",
    "Trains": "network: last stays in train mode",
    "Extra": "'_extra_state' of its state dict cannot be stored",
}


@pytest.mark.parametrize("name", REFUSED)
def test_error_in_foreign_code_is_one_line_at_the_import(name, by_hand, tmp_path):
    code, [line], _ = by_hand("train", name)
    assert code == 2
    assert REFUSED[name] in line
    [note] = (tmp_path / "results" / "tiny" / "failed").rglob("*.txt")
    assert REFUSED[name] in note.read_text()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_failure_during_an_attack_is_one_line_and_the_cache_is_kept(by_hand, tmp_path):
    assert by_hand("train", "Tires")[0] == 0
    code, [line], out = by_hand("evaluate", "Tires")
    assert code == 1
    assert "KeyError: 'tired'" in line
    assert "own_nets.py, line" in line
    assert "clean: " in out
    assert not list(tmp_path.rglob("best_val.json"))
    assert list((tmp_path / "results" / "tiny" / "resume" / "evaluations").rglob("*.npz"))


def test_outcomes_are_the_same_with_and_without_a_study(by_hand, tmp_path, study_data):
    study_data["evaluation"]["attacks"] = study_data["datasets"] = {}
    study_data["evaluation"]["selections"] = {"best_val": ["clean", "pgd", "fgsm", "square"]}
    assert by_hand("train", "Net")[0] == 0
    assert by_hand("evaluate", "Net")[0] == 0
    words = ["evaluate", "--callable", "own_nets:Net", "--dataset", "digits", "--eps", "0.15"]
    words += ["--attacks", "clean,pgd,fgsm,square", "--n-examples", "12", "--batch-size", "5"]
    assert main(words) == 0
    [of_study] = (tmp_path / "results" / "tiny").rglob("*.flags.npz")
    with (
        np.load(of_study) as one,
        np.load(tmp_path / "results" / "callable" / "own_nets.Net.Linf-0.15.flags.npz") as other,
    ):
        assert one.files == other.files
        names = [name for name in one.files if name.endswith(".all")]
        assert len(names) == 4
        assert all((one[name] == other[name]).all() for name in names)


def test_masks_of_foreign_code_are_not_compared(from_everywhere, own_nets):
    own_nets(LINEAR)
    study, layout = from_everywhere
    half = {
        name: model.model_copy(update={"sparsity": 0.5}) if name in ("given", "made") else model
        for name, model in study.models.items()
    }
    study = dataclasses.replace(study, models=half)
    study = dataclasses.replace(study, planned=Plan(study, study.attacks))
    for name in ("given", "made"):
        external.import_network(study, cell_of(study, name), layout)
    assert overlap.mask_overlaps(study, layout) == []
