"""Networks of a function and of the zoo, from the config to the tables, by the workflow."""

import numpy as np
import pandas as pd
import pytest

NETS = """
import torch
from torch import nn


def conv():
    torch.manual_seed(1)
    unused = nn.Conv2d(1, 2, 3)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    model[1].register_module("unused", unused)
    return model


def drawn():
    torch.seed()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
# What this suite asks of robustbench, with a network that needs no download.
ZOO = {
    "__init__.py": "",
    "model_zoo/__init__.py": """
from .enums import BenchmarkDataset, ThreatModel
model_dicts = {BenchmarkDataset.digits: {ThreatModel.Linf: {"Small-2.0": {}}}}
""",
    "model_zoo/enums.py": """
from enum import Enum


class BenchmarkDataset(Enum):
    digits = "digits"


class ThreatModel(Enum):
    Linf = "Linf"
""",
    "utils.py": """
import torch
from torch import nn


def load_model(name, model_dir, dataset, threat_model):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
""",
}
COMMON = {"dataset": "digits", "objective": "at"}


@pytest.fixture(scope="module")
def finished(project_at, tmp_path_factory):
    """A workflow that has attacked networks of foreign code alone, and what it printed."""
    project = project_at(tmp_path_factory.mktemp("elsewhere") / "project")
    (project.root / "nets.py").write_text(NETS)
    for name, text in ZOO.items():
        path = project.root / "fakes" / "robustbench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    project.write(
        {
            "study": "elsewhere",
            "title": "Networks from elsewhere",
            "models": {
                "made": COMMON | {"callable": "nets:conv"},
                "drawn": COMMON | {"callable": "nets:drawn"},
                "fetched": COMMON | {"zoo": "Small-2.0", "label": "Fetched"},
            },
            "threat": {"eps": 0.15},
            "training": {"crafting": {"step_size": 0.1}},
            "evaluation": {
                "n_examples": 20,
                "batch_size": 20,
                "attacks": {"pgd": {"steps": 3, "restarts": 1}},
                "selections": {"last": ["clean", "pgd"]},
                "sanity_checks": {"n_examples": 0},
            },
        },
        "config/elsewhere.yaml",
    )
    words = ("--cores", "2", "--configfile", "config/elsewhere.yaml")
    done = project.run("snakemake", *words, PYTHONPATH=str(project.root / "fakes"))
    logs = "".join(path.read_text() for path in project.root.glob("results/**/logs/**/*.log"))
    assert done.returncode == 0, done.stderr + logs
    return project, done


def test_the_workflow_attacks_networks_of_functions_and_of_the_zoo(finished):
    project, done = finished
    rows = pd.read_csv(project.root / "results" / "elsewhere" / "results.csv")
    origin = rows.drop_duplicates("method").set_index("method").origin.to_dict()
    assert origin.pop("drawn").startswith("callable nets:drawn, builds other weights each time")
    assert origin == {"made": "callable nets:conv", "fetched": "zoo Small-2.0"}
    assert set(rows.attack) == {"clean", "pgd"}
    assert rows.groupby("method").prunable.first().to_dict() == {
        "made": 36 + 18 + 1440,
        "drawn": 640,
        "fetched": 640,
    }
    layers = pd.read_csv(project.root / "results" / "elsewhere" / "layers.csv")
    made = layers[layers.method == "made"].set_index("layer").positions.to_dict()
    assert made == {"0": 36, "1.unused": 0, "3": 1}
    table = (project.root / "results" / "elsewhere" / "tables" / "main.md").read_text()
    assert table in done.stdout
    assert table.count("## ") == 1
    assert [line.split("|")[1].strip() for line in table.splitlines() if "last  " in line] == [
        "made",
        "drawn",
        "Fetched",
    ]


def test_the_workflow_and_the_command_agree_image_for_image(finished):
    project, _ = finished
    options = ("--dataset", "digits", "--eps", "0.15", "--attacks", "clean", "--n-examples", "20")
    done = project.run("robsparse", "evaluate", "--callable", "nets:conv", *options)
    assert done.returncode == 0, done.stderr
    [one] = (project.root / "results" / "elsewhere").rglob("made/**/last.flags.npz")
    other = project.root / "results" / "callable" / "nets.conv.Linf-0.15.flags.npz"
    with np.load(one) as ours, np.load(other) as alone:
        assert (ours["clean.all"] == alone["clean.all"]).all()
