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
        selections={"last": ["clean"]},
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
    assert numbers["huge_eps"] <= numbers["chance"]
    assert 0.1 <= numbers["chance"] <= 0.13
    assert 1 > numbers["pgd_10"] >= numbers["pgd_200"] > 0.2  # else little would be shown


class Says(nn.Module):
    """Takes every image for class 0, with gradients that change nothing."""

    def forward(self, x):
        return x.flatten(1)[:, :3] * 1e-3 + torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("share", [0.34, 0.6, 0.95])
def test_network_that_names_the_largest_class_leaves_what_guessing_leaves(share):
    """However unbalanced the classes are, that is no sign of robustness that is not real."""
    part = unbalanced(share)
    found = examine(Says(), part)
    for name in ("correct", "huge_eps", "chance"):
        assert found.numbers[name] == pytest.approx(share)
    assert found.reasons == ()


def unbalanced(share: float) -> Part:
    """Images of three classes, of which class 0 has a share."""
    y = 1 + torch.arange(IMAGES) % 2
    y[: round(share * IMAGES)] = 0
    return Part(torch.rand(IMAGES, 1, 8, 8), y)


def test_more_than_the_largest_class_correct_at_eps_1_is_suspicious():
    """Of an unbalanced set too: guessing leaves 60 %, and two images more are beyond it."""

    numbers = examine(Says(), unbalanced(0.6)).numbers
    for excess, suspicious in ((1, False), (2, True)):
        reasons = doubts._reasons(numbers | {"huge_eps": 0.6 + excess / IMAGES})
        assert (
            any("still correct at eps 1, where chance is 60%" in r for r in reasons) == suspicious
        )


@pytest.mark.parametrize(("flat", "suspicious"), [(1, False), (2, True)])
def test_one_image_without_a_gradient_is_no_reason_yet_where_few_are_correct(flat, suspicious):
    """Of 10 correct images one is 10 %, which is more than the limit of 5 %."""
    numbers = examine(Says(), unbalanced(0.34)).numbers | {"correct": 0.1}
    reasons = doubts._reasons(numbers | {"zero_gradient": flat / 10, "huge_eps": 0.0})
    assert any("no gradient" in reason for reason in reasons) == suspicious


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
