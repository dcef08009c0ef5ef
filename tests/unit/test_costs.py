"""The table of costs in docs/baselines.md against records and against the passes of the network."""

import json
import re

import numpy as np
import pytest
import torch

from robsparse.study.cells import Layout
from robsparse.study.cost import PASSES
from robsparse.training import loop

S2AP = {"gamma": 0.1, "warmup": 0}

# row of the table -> method, further keys of its parts, share of its steps with the cost
ROWS = {
    "`awp`": ("dense", {"training": {"awp": {"gamma": 0.01}}}, 1),
    "`s2ap`": (
        "hydra",
        {"methods": {"hydra": {"prune": {"s2ap": {"gamma": 0.1, "warmup": 0}}}}},
        0.5,
    ),
    "`clean_passes: 1`": ("dense", {"methods": {"dense": {"pretrain": {"clean_passes": 1}}}}, 1),
    "`clean_passes: 2`": ("dense", {"methods": {"dense": {"pretrain": {"clean_passes": 2}}}}, 1),
    "`label_smoothing`": ("dense", {"training": {"label_smoothing": 0.1}}, 1),
    "`ema`": ("dense", {"training": {"ema": {"decay": 0.9}}}, 1),
    "`nesterov`": ("dense", {"methods": {"dense": {"pretrain": {"nesterov": True}}}}, 1),
    "`synthetic_file`": ("dense", {"training": {"synthetic_file": "{file}"}}, 1),
    "`activation: silu`": ("dense", {"archs": {"small_cnn": {"activation": "silu"}}}, 1),
    '`pattern: "2:4"`': ("hydra", {"methods": {"hydra": {"pattern": "2:4"}}}, 1),
    "`robust_bird`": ("robust_bird", {}, 1),
    "`twinrep`": ("twinrep", {}, 1),
    "`scratch_ticket`": ("scratch_ticket", {}, 1),
    "`flyingbird_plus`": ("flyingbird_plus", {}, 1),
}


def table(repository):
    """The rows of the table: name -> objective -> forward and backward passes."""
    text = (repository / "docs" / "baselines.md").read_text()
    lines = text.split("| option or method | `at` | `trades` |")[1].split("\n\n")[0]
    found = {}
    for line in lines.splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")][:3]
        numbers = [tuple(int(number) for number in cell.split(",")) for cell in cells]
        found[name] = dict(zip(("at", "trades"), numbers, strict=True))
    return found


def merge(data, changes):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            merge(data[key], value)
        else:
            data[key] = value


@pytest.fixture
def counted(monkeypatch):
    """The passes of the network in train mode; images are crafted in eval mode."""
    seen, ordinary = [], loop.prepare_session

    def note(module, given):
        if module.training:
            seen.append(len(given[0]))

    note.only_reads = True

    def prepare(*given):
        session = ordinary(*given)
        session.run.model.register_forward_pre_hook(note)
        return session

    monkeypatch.setattr(loop, "prepare_session", prepare)
    return seen


@pytest.fixture
def train(study_data, load_study, counted, tmp_path):
    """train(method, objective, changes) -> cost of the cell alone, its steps, crafting steps."""
    labels = np.arange(60) % 10
    images = np.repeat(labels, 64).reshape(60, 8, 8) / 9
    np.savez(tmp_path / "extra.npz", images=images, labels=labels)

    def run(method, objective, changes):
        study_data["training"]["batch_size"] = 200
        study_data["grid"] |= {"methods": sorted({"dense", method}), "objectives": [objective]}
        study_data["methods"] = {
            "dense": {"pretrain": {"epochs": 1, "lr": 0.1}},
            "hydra": {"prune": {"epochs": 1}, "finetune": {"epochs": 1}},
        } | {name: {"train": {"epochs": 2}} for name in [method] if name not in ("dense", "hydra")}
        text = json.dumps(changes).replace("{file}", str(tmp_path / "extra.npz"))
        merge(study_data, json.loads(text))
        study, layout = load_study(study_data), Layout(tmp_path / "run")
        (cell,) = (cell for cell in study.cells() if cell.method == method)
        names = ("forward_passes", "backward_passes", "epochs")
        before = dict.fromkeys(names, 0)
        if (start := study.starting_cell(cell)) is not None:
            loop.train_cell(study, start, layout, device="cpu")
            before = json.loads(layout.training(start).read_text())["cost"]
            counted.clear()
        loop.train_cell(study, cell, layout, device="cpu")
        cost = json.loads(layout.training(cell).read_text())["cost"]
        own = {name: cost[name] - before[name] for name in names}
        session = loop.prepare_session(study, cell, layout, torch.device("cpu"))
        return own, own["epochs"] * session.batches.steps, study.training.crafting.steps

    return run


def test_the_table_has_a_tested_row_for_each_option_and_method(repository):
    assert table(repository).keys() == ROWS.keys()


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_the_table_of_objectives_has_their_passes(steps, repository):
    text = (repository / "docs" / "baselines.md").read_text()
    lines = text.split("| objective | forward | backward |")[1].split("\n\n")[0].splitlines()[2:]
    found = {}
    for line in lines:
        names, *formulas = [cell.strip() for cell in line.strip("|").split("|")]
        terms = [formula.replace("s/2", str(steps / 2)).split(" + ") for formula in formulas]
        passes = tuple(sum(float(t.replace("s", str(steps))) for t in own) for own in terms)
        found |= dict.fromkeys(re.findall("`(.*?)`", names), passes)
    assert found == {name: passes(steps) for name, passes in PASSES.items()}


@pytest.mark.parametrize("objective", ["at", "trades"])
@pytest.mark.parametrize("row", ROWS)
def test_the_table_has_the_passes_of_the_record_and_of_the_network(
    row, objective, repository, train, counted
):
    method, changes, share = ROWS[row]
    cost, steps, crafting = train(method, objective, changes)
    plain, further = PASSES[objective](crafting), table(repository)[row][objective]
    for kind, usual, more in zip(("forward", "backward"), plain, further, strict=True):
        assert cost[f"{kind}_passes"] == steps * (usual + share * more)
    assert len(counted) == steps * (PASSES[objective](0)[1] + share * further[0])
