"""A network that a Python function returns, and evaluations that cannot be right."""

import json

import numpy as np
import pytest

NETS = """
import torch
from torch import nn


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def rounded():
    class Round(nn.Module):
        def forward(self, x):
            return (4 * x).round() / 4

    return nn.Sequential(Round(), linear())


def eleven():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 11))


def coloured():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def tuples():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    return Two()


def detached():
    class Cut(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10].detach()

    return Cut()


def number():
    return 3


def fails():
    raise ValueError("no such luck")
"""


@pytest.fixture
def nets(project):
    (project.root / "nets.py").write_text(NETS)
    return project


def evaluate(project, *words, **options):
    given = {"dataset": "digits", "eps": "0.15", "attacks": "clean,pgd", "n-examples": "30"}
    flat = [word for key, value in (given | options).items() for word in (f"--{key}", value)]
    return project.run("robsparse", "evaluate", *flat, *map(str, words))


def test_a_function_gives_the_network(nets):
    done = evaluate(nets, "--callable", "nets:linear", attacks="clean,pgd,fgsm,fmn,square")
    assert done.returncode == 0, done.stderr
    assert "640 of 640 prunable weights are nonzero" in done.stdout
    path = nets.root / "results/callable/nets.linear.Linf-0.15.evaluation.json"
    assert str(path.relative_to(nets.root)) in done.stdout
    record = json.loads(path.read_text())
    assert [row["attack"] for row in record["rows"]] == ["clean", "pgd", "fgsm", "fmn", "square"]
    assert record["rows"][0]["potentially_unreliable"] == ""
    assert record["sanity_checks"]["examined"] == 30
    with np.load(nets.root / "results/callable/nets.linear.Linf-0.15.flags.npz") as flags:
        assert flags["fmn.distance"].shape == (30,)


def test_potentially_unreliable_network_is_told(nets):
    done = evaluate(nets, "--callable", "nets:rounded")
    assert done.returncode == 0, done.stderr
    assert "potentially unreliable: no gradient on 100% of the images" in done.stdout


def test_norm_of_the_attacks_can_be_chosen(nets):
    done = evaluate(nets, "--callable", "nets:linear", norm="L2", eps="0.5")
    assert done.returncode == 0, done.stderr
    assert "L2 eps 0.5" in done.stdout


def test_nothing_is_kept_once_the_record_is_there(nets):
    for _ in range(2):
        done = evaluate(nets, "--callable", "nets:linear", attacks="autoattack")
        assert done.returncode == 0, done.stderr
        assert "taken from an earlier run" not in done.stdout
        assert not list(nets.root.glob("results/**/resume/**/*.npz"))


BAD = {
    "eleven": "expected logits (2, 10); the data set has 10 classes",
    "coloured": "network: fails on 2 images of shape (1, 8, 8)",
    "tuples": "2 images give tuple, expected logits (2, 10)",
    "detached": "its outputs have no gradient",
    "number": "nets:number: expected a function that returns a torch module, found int",
    "fails": "nets:fails: ValueError: no such luck",
    "nothing": "nets:nothing: AttributeError",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_network_is_one_line(name, nets):
    done = evaluate(nets, "--callable", f"nets:{name}")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert BAD[name] in line
    assert not list((nets.root / "results").rglob("*.json"))


OPTIONS = {
    "eps of 0": ({"eps": "0"}, "threat.eps"),
    "eps above 1": ({"eps": "3/2"}, "threat.eps"),
    "too many images": ({"n-examples": "5000"}, "n_examples = 5000"),
    "attack": ({"attacks": "clean,pgdd"}, "nearest match: 'pgd'"),
    "no surrogate": ({"attacks": "transfer"}, "no network of 'dense' as surrogate for"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_that_cannot_be_is_one_line(name, nets):
    options, message = OPTIONS[name]
    done = evaluate(nets, "--callable", "nets:linear", **options)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert message in line
    assert not list((nets.root / "results").rglob("*.json"))


@pytest.mark.parametrize("source", ["nets", "no_such_module:net"])
def test_callable_that_is_not_there_is_one_line(source, nets):
    done = evaluate(nets, "--callable", source)
    assert done.returncode == 2
    assert source.split(":")[0] in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_results_that_cannot_be_written_are_told_before_the_attacks(nets):
    (nets.root / "results").mkdir(exist_ok=True)
    (nets.root / "results" / "callable").write_text("a file where a folder should be")
    done = evaluate(nets, "--callable", "nets:linear")
    assert done.returncode == 2
    assert "cannot write results here" in done.stderr
    assert "correct" not in done.stdout
