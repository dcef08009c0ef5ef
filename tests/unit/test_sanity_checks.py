"""The sanity checks flag networks that only seem robust, and no other networks."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.evaluation import sanity_checks
from robsparse.evaluation.attacks import Outcome
from robsparse.schema.evaluation import Evaluation, SanityChecks
from robsparse.schema.threat import Threat

CPU = torch.device("cpu")
EPS = 0.1
IMAGES = 100


def examine(model: nn.Module, part: Part, folder=None, **changes) -> sanity_checks.Findings:
    settings = Evaluation(
        n_examples=len(part),
        batch_size=64,
        selections={"last": ["clean"]},
        sanity_checks=SanityChecks(**{"n_examples": IMAGES, "queries": 300} | changes),
    )
    return sanity_checks.examine(model.eval(), part, settings, Threat(eps=EPS), CPU, folder=folder)


class Wrapped(nn.Module):
    """A network with a function before it (of the images) or after it (of the outputs)."""

    def __init__(self, network, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x):
        return self.after(self.network(self.before(x)))


class Shattered(torch.autograd.Function):
    """Return the image unchanged, with a wrong gradient."""

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


UNRELIABLE = {
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


@pytest.mark.parametrize("name", UNRELIABLE)
def test_network_that_only_seems_robust_is_flagged(name, known_network):
    model, part = known_network
    how, reasons = UNRELIABLE[name]
    found = examine(Wrapped(model, **how), part)
    for reason in reasons:
        assert any(reason in text for text in found.reasons), found
    assert found.potentially_unreliable([])
    assert all(math.isfinite(value) for value in found.numbers.values())
    if name == "NaN":
        assert found.numbers["randomness"] == 0  # two passes over the same images


def test_network_without_faults_is_not_flagged(known_network):
    model, part = known_network
    found = examine(model, part)
    assert found.reasons == ()
    assert found.potentially_unreliable([Outcome({})]) == ""
    numbers = found.numbers
    assert numbers["examined"] == IMAGES
    assert numbers["randomness"] == numbers["nan_logits"] == numbers["zero_gradient"] == 0
    assert numbers["huge_eps"] <= numbers["chance"]
    assert 0.1 <= numbers["chance"] <= 0.13
    assert 1 > numbers["pgd_10"] >= numbers["pgd_200"] > 0.2  # otherwise the test shows little


class Says(nn.Module):
    """Predicts class 0 for every image. Its gradients are useless."""

    def forward(self, x):
        return x.flatten(1)[:, :3] * 1e-3 + torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("share", [0.34, 0.6, 0.95])
def test_network_that_always_predicts_the_largest_class_is_not_flagged(share):
    """This holds for any share of the largest class."""
    part = unbalanced(share)
    found = examine(Says(), part)
    for name in ("correct", "huge_eps", "chance"):
        assert found.numbers[name] == pytest.approx(share)
    assert found.reasons == ()


def unbalanced(share: float) -> Part:
    """Images of three classes. Class 0 has the given share."""
    y = 1 + torch.arange(IMAGES) % 2
    y[: round(share * IMAGES)] = 0
    return Part(torch.rand(IMAGES, 1, 8, 8), y)


def test_more_than_the_largest_class_correct_at_eps_1_is_flagged():
    """In an unbalanced set, guessing has 60 %. Two more images are above the limit."""

    numbers = examine(Says(), unbalanced(0.6)).numbers
    for excess, flagged in ((1, False), (2, True)):
        reasons = sanity_checks._reasons(numbers | {"huge_eps": 0.6 + excess / IMAGES})
        assert any("still correct at eps 1, where chance is 60%" in r for r in reasons) == flagged


@pytest.mark.parametrize(("flat", "flagged"), [(1, False), (2, True)])
def test_one_image_without_a_gradient_is_allowed_if_few_are_correct(flat, flagged):
    """One of 10 correct images is 10 %. The limit is 5 %."""
    numbers = examine(Says(), unbalanced(0.34)).numbers | {"correct": 0.1}
    reasons = sanity_checks._reasons(numbers | {"zero_gradient": flat / 10, "huge_eps": 0.0})
    assert any("no gradient" in reason for reason in reasons) == flagged


def test_warnings_of_attacks_are_added_to_the_reasons_once():
    findings = sanity_checks.Findings({}, ("one",))
    outcomes = [Outcome({}, warnings=["two", "one"]), Outcome({}, warnings=["two"])]
    assert findings.potentially_unreliable(outcomes) == "one; two"


def test_checks_can_be_disabled_and_use_a_limited_number_of_images(known_network):
    model, part = known_network
    assert examine(model, part, n_examples=0) == sanity_checks.Findings()
    few = Part(part.x_NCHW[:7], part.y_N[:7])
    assert examine(model, few).numbers["examined"] == 7


def test_checks_do_not_change_the_network_and_random_numbers(known_network):
    model, part = known_network
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    examine(model, part)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_network_that_is_always_wrong_is_not_flagged(known_network):
    model, part = known_network
    wrong = Part(part.x_NCHW, (part.y_N + 1) % 10)
    found = examine(model, wrong)
    assert found.reasons == ()
    assert found.numbers["pgd_10"] == 0


# ---------------------------------------------------------------- an interrupted evaluation


class Killed(BaseException):
    """Like KeyboardInterrupt, nothing catches it."""


@pytest.fixture
def steps_of_pgd(monkeypatch):
    """Each call appends the steps of PGD, or "search"; `stop_at` raises Killed there."""
    called, stop_at = [], []
    ascend, search = perturb.ascend, sanity_checks.random_search

    def counted(name, function, *words, **options):
        called.append(name)
        if name in stop_at:
            raise Killed
        return function(*words, **options)

    monkeypatch.setattr(perturb, "ascend", lambda *w, **o: counted(o["steps"], ascend, *w, **o))
    monkeypatch.setattr(
        sanity_checks, "random_search", lambda *w, **o: counted("search", search, *w, **o)
    )
    return called, stop_at


@pytest.mark.parametrize("killed_in", [20, 50, 200, "search"])
def test_finished_checks_of_a_killed_evaluation_are_not_done_again(
    killed_in, known_network, steps_of_pgd, tmp_path
):
    model, part = known_network
    called, stop_at = steps_of_pgd
    expected = examine(model, part)
    order = list(dict.fromkeys(called))
    assert order == [20, 10, 50, 200, "search"]
    stop_at.append(killed_in)
    with pytest.raises(Killed):
        examine(model, part, tmp_path)
    stop_at.clear()
    called.clear()
    assert examine(model, part, tmp_path) == expected
    assert list(dict.fromkeys(called)) == order[order.index(killed_in) :]
    called.clear()
    assert examine(model, part, tmp_path) == expected
    assert called == []


@pytest.mark.parametrize("change", ["queries", "images", "network", "eps"])
def test_checks_of_another_network_or_setting_are_not_taken_from_the_cache(
    change, known_network, steps_of_pgd, tmp_path, monkeypatch
):
    model, part = known_network
    called, _ = steps_of_pgd
    examine(model, part, tmp_path)
    called.clear()
    options = {"queries": 301} if change == "queries" else {}
    if change == "images":
        options["n_examples"] = IMAGES - 1
    if change == "network":
        model = copy.deepcopy(model)
        next(model.parameters()).data += 1e-3
    if change == "eps":
        monkeypatch.setitem(globals(), "EPS", 0.11)
    examine(model, part, tmp_path, **options)
    assert set(called) == {20, 10, 50, 200, "search"}


# ---------------------------------------------------------------- numbers and limits by hand

HONEST = {
    "examined": 100.0,
    "randomness": 0.0,
    "probabilities": 0.0,
    "nan_logits": 0.0,
    "correct": 0.9,
    "zero_gradient": 0.0,
    "huge_eps": 0.0,
    "chance": 0.1,
    "pgd_10": 0.5,
    "pgd_50": 0.5,
    "pgd_200": 0.5,
    "black_box_only": 0.0,
}
# number, a value below its limit, a value above it, and the expected reason
LIMITS = {
    "randomness": (1e-4, 1.1e-4, "randomised: two passes differ by 0.00011"),
    "probabilities": (0.0, 1.0, "outputs are probabilities, expected logits"),
    "nan_logits": (0.0, 1.0, "1 outputs are not a number"),
    "zero_gradient": (0.04, 0.06, "no gradient on 6% of the images"),
    "huge_eps": (0.115, 0.12, "12% still correct at eps 1, where chance is 10%"),
    "pgd_50": (0.515, 0.53, "PGD has not converged: 53% survive 50 steps, 50% survive 200"),
    "black_box_only": (
        0.02,
        0.03,
        "random search breaks 3% of the images that withstand 200 steps of PGD",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit_of_each_number(name):
    below, above, message = LIMITS[name]
    assert sanity_checks._reasons(HONEST | {name: below}) == []
    assert sanity_checks._reasons(HONEST | {name: above}) == [message]


@pytest.mark.parametrize("name", ["pgd_50", "black_box_only"])
def test_one_image_above_a_limit_is_allowed(name):
    few = HONEST | {"examined": 10.0}
    shift = 0.5 if name == "pgd_50" else 0.0
    assert sanity_checks._reasons(few | {name: shift + 0.1}) == []
    assert sanity_checks._reasons(few | {name: shift + 0.2})


class Slope(nn.Module):
    """Logits (0, a - b) of images (a, b)."""

    def forward(self, x):
        a, b = x.flatten(1).unbind(1)
        return torch.stack([torch.zeros_like(a), a - b], dim=1)


# L-inf distances to class 0: none (misclassified), 0.05, 0.15 and 0.25.
SLOPED = Part(
    torch.tensor([[0.4, 0.5], [0.5, 0.4], [0.5, 0.2], [0.6, 0.1]]).view(4, 1, 1, 2),
    torch.tensor([1, 1, 1, 1]),
)


def test_numbers_of_a_known_network():
    settings = Evaluation(
        n_examples=4,
        batch_size=3,
        selections={"last": ["clean"]},
        sanity_checks=SanityChecks(n_examples=4, queries=9),
    )
    numbers = sanity_checks.examine(Slope(), SLOPED, settings, Threat(eps=0.2), CPU).numbers
    assert numbers["examined"] == 4
    assert numbers["correct"] == 0.75
    assert numbers["chance"] == 1.0
    assert (numbers["randomness"], numbers["probabilities"], numbers["nan_logits"]) == (0, 0, 0)
    assert numbers["huge_eps"] == 0
    assert numbers["pgd_10"] == numbers["pgd_50"] == numbers["pgd_200"] == 0.25


def test_only_the_long_attacks_use_the_norm_of_the_threat(monkeypatch):
    """L2 distances are longer. At an L-inf eps of 1, an image can become any other image."""
    monkeypatch.setattr(sanity_checks, "random_search", lambda model, x, y, **options: x)
    settings = Evaluation(
        n_examples=4, selections={"last": ["clean"]}, sanity_checks=SanityChecks(queries=9)
    )
    threat = Threat(norm="L2", eps=0.2)
    numbers = sanity_checks.examine(Slope(), SLOPED, settings, threat, CPU).numbers
    assert numbers["pgd_200"] == 0.5
    assert numbers["huge_eps"] == 0


def test_images_without_a_gradient_are_counted_among_the_correct_ones():
    class Steps(Slope):
        def forward(self, x):
            return super().forward(x.where(x > 0.45, x.detach()))

    checks = sanity_checks._Checks(Steps(), SLOPED, 3, CPU)
    checks.outputs()
    assert checks.correct.tolist() == [False, True, True, True]
    assert checks.zero_gradients().tolist() == [False] * 4
    flat = Part(SLOPED.x_NCHW * 0.8, SLOPED.y_N)  # no pixel of the first three images is above 0.45
    checks = sanity_checks._Checks(Steps(), flat, 3, CPU)
    checks.outputs()
    assert int(checks.zero_gradients().sum()) == 2


def test_sum_of_pgd_steps_is_two_and_a_half_times_eps(monkeypatch):
    seen, plain = [], perturb.ascend

    def ascend(model, x, start, loss, **options):
        seen.append(options)
        return plain(model, x, start, loss, **options)

    monkeypatch.setattr(perturb, "ascend", ascend)
    checks = sanity_checks._Checks(Slope(), SLOPED, 4, CPU)
    checks.outputs()
    checks.survive_pgd(0.2, 10, "L2")
    assert seen == [{"eps": 0.2, "step_size": 2.5 * 0.2 / 10, "steps": 10, "norm": "L2"}]


def test_random_search_attacks_only_the_survivors(monkeypatch):
    seen = []

    def search(model, x, y, **options):
        seen.append((len(x), y.tolist(), options))
        return x.flip(3)  # the other class

    monkeypatch.setattr(sanity_checks, "random_search", search)
    checks = sanity_checks._Checks(Slope(), SLOPED, 2, CPU)
    among = torch.tensor([False, True, True, True])
    broken = checks.broken_by_search(among, Threat(norm="L2", eps=0.3), 7, 5)
    assert broken.tolist() == among.tolist()
    options = {"norm": "L2", "eps": 0.3, "queries": 7, "restarts": 1, "seed": 5}
    assert seen == [(2, [1, 1], options), (1, [1], options)]


def test_passes_of_the_checks():
    settings = Evaluation(
        n_examples=4, selections={"last": ["clean"]}, sanity_checks=SanityChecks(queries=9)
    )
    assert sanity_checks.passes(settings) == (20 + 10 + 50 + 200, 9)


def test_probabilities_are_found_by_range_and_sum():
    def of(model):
        checks = sanity_checks._Checks(model, SLOPED, 3, CPU)
        return checks.outputs()["probabilities"]

    assert of(Wrapped(Slope(), after=lambda z: torch.softmax(z, 1))) == 1
    assert of(Wrapped(Slope(), after=lambda z: torch.softmax(z, 1) * 1.01)) == 0
    negative = torch.tensor([[-1.0, 2.0]])
    assert of(Wrapped(Slope(), after=lambda z: negative.expand(len(z), 2))) == 0


def test_largest_difference_of_two_passes():
    calls = []

    def drift(z):
        calls.append(0)
        return z + len(calls) ** 2 * 0.25

    checks = sanity_checks._Checks(Wrapped(Slope(), after=drift), SLOPED, 2, CPU)
    assert checks.outputs()["randomness"] == pytest.approx(1.75)  # 16 - 9 quarters, not 4 - 1
