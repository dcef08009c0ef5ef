"""Cached results of an evaluation are used only for exactly the same attack."""

import dataclasses

import pytest
import torch
from torch import nn

from robsparse.base import registry
from robsparse.datasets import Part
from robsparse.evaluation.runner import attack_model
from robsparse.records import provenance
from robsparse.study import source_code
from robsparse.study.planned import Attack

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two classes. `sign` is an attribute that is not a weight."""

    def __init__(self, sign=1.0):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.sign = sign
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]))
            self.layer.bias.zero_()

    def forward(self, x_NCHW):
        return self.sign * self.layer(x_NCHW.flatten(1))


class Noisy(Net):
    """Draws random numbers, as a randomised defence does."""

    def forward(self, x_NCHW):
        return super().forward(x_NCHW + 0.01 * torch.randn_like(x_NCHW))


@dataclasses.dataclass
class Asked:
    """One call of attack_model."""

    folder: object
    model: nn.Module = dataclasses.field(default_factory=Net)
    surrogate: nn.Module = dataclasses.field(default_factory=Net)
    attack: str = "pgd"
    params: dict = dataclasses.field(default_factory=lambda: {"steps": 2})
    eps: float = 0.1
    norm: str = "Linf"
    seed: int = 0
    batch_size: int = 5
    folded: bool = False
    shift: float = 0.0

    def run(self):
        x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.9 + self.shift
        attacks = [
            Attack(name, name, registry.entry("attack", name).params(**params), self.norm, eps)
            for name, params, eps in (("clean", {}, 0.0), (self.attack, self.params, self.eps))
        ]
        return attack_model(
            self.model,
            Part(x, torch.tensor([0, 1, 0, 1, 0, 1])),
            attacks,
            seed=self.seed,
            batch_size=self.batch_size,
            device=CPU,
            cache=self.folder,
            surrogate=lambda _: self.surrogate,
            folded=self.folded,
        )


@pytest.fixture
def runs(monkeypatch):
    """A list of the names of the attacks that have run."""
    found = []
    load = registry.load

    def counting(kind, name):
        module = load(kind, name)

        class Counted:
            @staticmethod
            def run(*words):
                found.append(name)
                return module.run(*words)

        return Counted

    monkeypatch.setattr(registry, "load", counting)
    return found


def changed_bias(asked):
    with torch.no_grad():
        asked.surrogate.layer.bias[0] += 1e-6


CHANGES = {
    "eps": {"eps": 0.2},
    "norm": {"norm": "L2"},
    "seed": {"seed": 1},
    "batch size": {"batch_size": 4},
    "a parameter": {"params": {"steps": 3}},
    "the forward pass": {"model": Net(sign=-1.0)},
    "a class with the same weights": {"model": Noisy()},
    "the images": {"shift": 0.05},
    "view or network": {"folded": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_is_used_only_for_the_same_attack(change, tmp_path, runs):
    Asked(tmp_path).run()
    assert runs == ["clean", "pgd"]
    Asked(tmp_path).run()
    assert runs == ["clean", "pgd"]
    Asked(tmp_path, **CHANGES[change]).run()
    assert runs.count("pgd") == 2


@pytest.mark.parametrize("library", ["torch", "pyautoattack", "foolbox", "numpy", "python"])
def test_another_version_of_a_library_runs_the_attack_again(library, tmp_path, runs, monkeypatch):
    Asked(tmp_path).run()
    now = provenance.libraries()
    assert f"{library}=" in now
    monkeypatch.setattr(provenance, "libraries", lambda: now.replace(f"{library}=", f"{library}=9"))
    Asked(tmp_path).run()
    assert runs == ["clean", "pgd"] * 2


@pytest.mark.parametrize(
    ("module", "again"),
    [
        ("robsparse.eval.pgd", 1),
        ("robsparse.eval.fgsm", 0),
        ("robsparse.fast.forms", 1),
        ("robsparse.compute.perturb", 1),
        ("robsparse.figures.tables.study_tables", 0),
    ],
)
def test_edited_code_runs_the_attack_again_if_it_is_used(module, again, tmp_path, runs, edited):
    Asked(tmp_path).run()
    edited(module)
    Asked(tmp_path).run()
    assert runs.count("pgd") == 1 + again


@pytest.fixture
def edited(monkeypatch):
    """edited(module): change the source of the module."""
    read, paths = source_code.read, set()

    def reading(path):
        return read(path) + b"\nEDITED = 1\n" * (path in paths)

    def forget():
        source_code.digest.cache_clear()
        source_code.closure.cache_clear()
        source_code._source.cache_clear()

    def edit(module):
        paths.add(source_code.locate(module))
        forget()

    monkeypatch.setattr(source_code, "read", reading)
    yield edit
    monkeypatch.undo()
    forget()


def test_cache_of_a_transfer_attack_depends_on_the_surrogate(tmp_path, runs):
    asked = Asked(tmp_path, attack="transfer", params={"steps": 2})
    asked.run()
    asked.run()
    assert runs.count("transfer") == 1
    changed_bias(asked)
    asked.run()
    assert runs.count("transfer") == 2


def test_network_with_noise_has_the_same_digest_twice(tmp_path, runs):
    asked = Asked(tmp_path, model=Noisy())
    before = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(torch.seed())
        asked.run()
    assert runs == ["clean", "pgd"]
    torch.set_rng_state(before)


def test_digest_does_not_change_a_network(tmp_path):
    asked = Asked(tmp_path)
    torch.manual_seed(5)
    state, weights = torch.get_rng_state(), asked.model.layer.weight.clone()
    asked.run()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(asked.model.layer.weight, weights)
    assert asked.model.layer.weight.grad is None
    assert asked.model.layer.weight.requires_grad
