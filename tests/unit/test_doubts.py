"""Networks that only look robust raise doubts; an honest one raises none."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from robsparse import doubts
from robsparse.attacks import Outcome
from robsparse.config import Evaluation, Threat
from robsparse.datasets import Part
from robsparse.sections import Doubts

CPU = torch.device("cpu")
EPS = 0.1
IMAGES = 100


def examine(model: nn.Module, part: Part, **changes) -> doubts.Findings:
    settings = Evaluation(
        n_examples=len(part),
        batch_size=64,
        selections={"last": []},
        doubts=Doubts(**{"n_examples": IMAGES, "queries": 300} | changes),
    )
    return doubts.examine(model.eval(), part, settings, Threat(eps=EPS), CPU)


class Wrapped(nn.Module):
    """Something done to the images before a network sees them, or to its outputs after."""

    def __init__(self, network, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x):
        return self.after(self.network(self.before(x)))


class Shattered(torch.autograd.Function):
    """The image as it is, with a gradient that has nothing to do with it."""

    @staticmethod
    def forward(_, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        noise = torch.rand(gradient.shape, generator=torch.Generator().manual_seed(0))
        return noise - 0.5


def quantised(x):
    return torch.round(6 * x) / 6


def sharp_softmax(logits):
    return torch.softmax(100 * logits, 1)


def noisy(x):
    return x + 0.05 * torch.randn_like(x)


SUSPICIOUS = {
    "quantised input": ({"before": quantised}, ["no gradient on"]),
    "softmax with temperature": (
        {"after": sharp_softmax},
        ["outputs are probabilities, expected logits"],
    ),
    "random noise": ({"before": noisy}, ["randomised: two passes differ by"]),
    "shattered gradient": (
        {"before": Shattered.apply},
        ["random search breaks"],
    ),
    "NaN": (
        {"after": lambda logits: logits.where(logits.argmax(1, keepdim=True) != 3, torch.nan)},
        ["outputs are not a number"],
    ),
}


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_network_made_to_look_robust_is_told(name, known_network):
    model, part = known_network
    how, reasons = SUSPICIOUS[name]
    found = examine(Wrapped(model, **how), part)
    for reason in reasons:
        assert any(reason in text for text in found.reasons), found
    assert found.suspicious([])
    assert all(math.isfinite(value) for value in found.numbers.values())
    if name == "NaN":
        assert found.numbers["randomness"] == 0  # the same images, twice


def test_honest_network_raises_no_doubt(known_network):
    model, part = known_network
    found = examine(model, part)
    assert found.reasons == ()
    assert found.suspicious([Outcome({})]) == ""
    numbers = found.numbers
    assert numbers["examined"] == IMAGES
    assert numbers["randomness"] == numbers["nan_logits"] == numbers["zero_gradient"] == 0
    assert numbers["huge_eps"] <= numbers["chance"] == 0.1
    assert 1 > numbers["pgd_10"] >= numbers["pgd_200"] > 0.2  # else little would be shown


def test_warnings_of_attacks_join_the_reasons_once():
    findings = doubts.Findings({}, ("one",))
    outcomes = [Outcome({}, warnings=["two", "one"]), Outcome({}, warnings=["two"])]
    assert findings.suspicious(outcomes) == "one; two"


def test_looking_can_be_turned_off_and_is_bounded(known_network):
    model, part = known_network
    assert examine(model, part, n_examples=0) == doubts.Findings()
    few = Part(part.x_NCHW[:7], part.y_N[:7])
    assert examine(model, few).numbers["examined"] == 7


def test_looking_leaves_network_and_random_numbers_as_they_were(known_network):
    model, part = known_network
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    examine(model, part)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_network_that_is_always_wrong_is_not_suspicious(known_network):
    model, part = known_network
    wrong = Part(part.x_NCHW, (part.y_N + 1) % 10)
    found = examine(model, wrong)
    assert found.reasons == ()
    assert found.numbers["pgd_10"] == 0
