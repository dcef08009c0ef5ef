"""Validation of a network with outputs that are known by hand."""

import pytest
import torch
from torch import nn

from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.schema.threat import Crafting
from robsparse.study.cells import derive_seed
from robsparse.training import validation
from robsparse.training.objectives import Attacker


class Slope(nn.Module):
    """Logits (0, a - b) of images (a, b): class 1 where a > b."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        a, b = self.norm(x).flatten(1).unbind(1)
        return torch.stack([torch.zeros_like(a), a - b], dim=1)


# L-inf distances to the other class: 0.05 (misclassified), 0.05, 0.15 and 0.25.
ROWS = torch.tensor([[0.4, 0.5], [0.5, 0.4], [0.5, 0.2], [0.6, 0.1]])
PART = Part(ROWS.view(4, 1, 1, 2), torch.tensor([1, 1, 1, 1]))


def attacker(eps, step_size=0.05, norm="Linf"):
    crafting = Crafting(steps=1, step_size=step_size)
    return Attacker(eps, crafting, torch.Generator().manual_seed(0), norm)


@pytest.mark.parametrize(
    ("norm", "eps", "robust"),
    [
        ("Linf", 0.01, 0.75),
        ("Linf", 0.1, 0.5),
        ("Linf", 0.2, 0.25),
        ("Linf", 0.3, 0.0),
        ("L2", 0.18, 0.5),  # the L2 lengths are sqrt(2) times the L-inf lengths
        ("L2", 0.3, 0.25),
    ],
)
def test_accuracies_by_hand(norm, eps, robust):
    found = validation.validate(Slope(), PART, attacker(eps, norm=norm), steps=20)
    assert found == {"val_clean": 0.75, "val_robust": robust}


def test_steps_and_step_size_are_used():
    """One short step from a random start breaks fewer images than twenty steps."""
    few = validation.validate(Slope(), PART, attacker(0.16, step_size=0.001), steps=1)
    many = validation.validate(Slope(), PART, attacker(0.16, step_size=0.01), steps=40)
    assert few["val_robust"] > many["val_robust"] == 0.25


def test_all_batches_are_counted_and_modes_are_restored(monkeypatch):
    monkeypatch.setattr(validation, "BATCH", 3)
    model = Slope().train()
    found = validation.validate(model, PART, attacker(0.1), steps=20)
    assert found == {"val_clean": 0.75, "val_robust": 0.5}
    assert model.norm.training
    assert int(model.norm.num_batches_tracked) == 0


def test_seed_of_the_start_depends_on_the_number_of_images(monkeypatch):
    seen, plain = [], perturb.ascend

    def ascend(model, x, start, loss, **options):
        seen.append((start, options))
        return plain(model, x, start, loss, **options)

    monkeypatch.setattr(perturb, "ascend", ascend)
    made = attacker(0.1, step_size=0.03, norm="L2")
    validation.validate(Slope(), PART, made, steps=7)
    generator = torch.Generator().manual_seed(derive_seed("validate", 4))
    assert torch.equal(seen[0][0], perturb.uniform_start(PART.x_NCHW, 0.1, generator, "L2"))
    assert seen[0][1] == {"eps": 0.1, "step_size": 0.03, "steps": 7, "norm": "L2"}


def test_guessing_accuracy_and_correct_count_by_hand():
    assert validation.guessing_accuracy(Part(PART.x_NCHW, torch.tensor([0, 2, 2, 1]))) == 0.5
    assert validation.correct_count(Slope().eval(), PART.x_NCHW, PART.y_N) == 3
