"""The minimum-norm attack on networks with known distances."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from robsparse.datasets import Part
from robsparse.eval import fmn, minimum_norm
from robsparse.evaluation.attacks import AttackContext
from robsparse.evaluation.cache import Cache
from robsparse.evaluation.record import image_outcomes
from robsparse.evaluation.runner import attack_model
from robsparse.study.planned import Attack

CPU = torch.device("cpu")
EPS = 0.1
QUICK = {"fmn_steps": 10, "steps": 8, "queries": 20}


def attack_context(norm="Linf", eps=EPS, **options) -> AttackContext:
    options = {"seed": 3, "batch_size": 40, "report": lambda text: None} | options
    return AttackContext(norm=norm, eps=eps, device=CPU, **options)


def distances(model, x, y, params=None, **options) -> torch.Tensor:
    params = params or minimum_norm.Params(**QUICK)
    return minimum_norm.run(model, x, y, params, attack_context(**options)).distances


class Linear(nn.Module):
    """Logits (-m, m) with m = w.x + b, of 1x6x6 images; the plane contains their middle."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(36, generator=generator))
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())

    def forward(self, x):
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([-score, score], 1)


def images_of(model, low, high, n=24):
    generator = torch.Generator().manual_seed(5)
    x = low + (high - low) * torch.rand(n, 1, 6, 6, generator=generator)
    return x, model(x).argmax(1).detach()


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_distances_to_a_plane_are_the_geometric_distances(norm, dual):
    model = Linear().eval()
    x, y = images_of(model, 0.35, 0.65)
    weight = model.weight.detach()
    wanted = (x.flatten(1) @ weight + model.bias.detach()).abs() / weight.norm(dual)
    found = distances(model, x, y, minimum_norm.Params(), norm=norm)
    # Except for rounding, never below the true distance, and only a little above it.
    assert (found >= wanted - 1e-6).all()
    assert torch.allclose(found, wanted, rtol=0.01, atol=1e-4)


def clipped_distance(x, weight, margin) -> float:
    """The L-inf radius at which sum |w_i| min(radius, room_i) reaches the margin, by bisection."""
    towards_zero = weight * torch.sign(margin) > 0
    room = torch.where(towards_zero, x, 1 - x)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        reached = float((weight.abs() * room.clamp(max=middle)).sum()) >= float(margin.abs())
        low, high = (low, middle) if reached else (middle, high)
    return high


def test_distances_inside_the_pixel_range_are_the_geometric_distances():
    model = Linear().eval()
    generator = torch.Generator().manual_seed(6)
    x = (torch.rand(24, 1, 6, 6, generator=generator) > 0.5).float() * 0.96 + 0.02
    y = model(x).argmax(1).detach()
    weight = model.weight.detach()
    margins = x.flatten(1) @ weight + model.bias.detach()
    wanted = torch.tensor(
        [clipped_distance(a, weight, m) for a, m in zip(x.flatten(1), margins, strict=True)]
    )
    matters = wanted > 1.2 * margins.abs() / weight.norm(1)
    assert matters.float().mean() > 0.5
    found = distances(model, x, y, minimum_norm.Params())
    assert (found >= wanted - 1e-6).all()
    assert torch.allclose(found, wanted, rtol=0.02, atol=2e-4)


class Wrapped(nn.Module):
    def __init__(self, network, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x):
        return self.after(self.network(self.before(x)))


BLIND = {
    "quantised input": {"before": lambda x: torch.round(6 * x) / 6},
    "saturated softmax": {"after": lambda logits: torch.softmax(1000 * logits, 1)},
}


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize(("norm", "longest"), [("Linf", 1.0), ("L2", 8.0)])
def test_without_gradients_fmn_fails_and_the_other_searches_do_not(
    name, norm, longest, known_network
):
    network, part = known_network
    model = Wrapped(network, **BLIND[name]).eval()
    right = model(part.x_NCHW).argmax(1) == part.y_N
    x, y = part.x_NCHW[right][:80], part.y_N[right][:80]
    alone = fmn.run(model, x, y, fmn.Params(steps=20), attack_context(norm)).distances
    together = distances(model, x, y, norm=norm)
    assert (alone > 0.8 * longest).float().mean() > 0.9
    assert (together <= longest).all()
    assert (together > 0.5 * longest).float().mean() < 0.1
    assert (together <= alone).all()


def test_every_search_makes_known_perturbations_shorter(known_network):
    """Each search method breaks images that are not very robust."""
    model, part = known_network
    params = minimum_norm.Params(**QUICK)

    def search() -> minimum_norm._Search:
        return minimum_norm._Search(
            model, part.x_NCHW, part.y_N, params, attack_context(batch_size=200)
        )

    towards, ascent, query, adaptive = search(), search(), search(), search()
    towards.towards(part.x_NCHW, part.y_N)
    ascent.ascend(0.3, torch.Generator().manual_seed(0))
    query.query(0.3)
    adaptive.adapt(torch.arange(len(part)))
    assert towards.best.isfinite().all()
    for one in (ascent, query):
        found = one.best[one.best.isfinite()]
        assert len(found) > 100
        assert (found <= 0.3).all()
        assert (found < 0.29).float().mean() > 0.7  # shorter than before
    before = towards.best.clone()
    towards.adapt(torch.arange(len(part)), towards.nearest.clone())  # from the known versions
    assert (towards.best < 0.9 * before).float().mean() > 0.8
    assert (towards.best < adaptive.best).any()
    for one in (towards, ascent, query, adaptive):
        known = one.best.isfinite()
        apart = (one.nearest - part.x_NCHW).abs().amax((1, 2, 3))
        assert torch.allclose(one.best[known], apart[known], atol=1e-6)
        assert (model(one.nearest).argmax(1) != part.y_N)[known].all()


def test_a_constant_network_cannot_be_broken():
    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x.flatten(1)[:, :3] + torch.tensor([0.0, 2.0, 1.0])

    x = torch.rand(6, 1, 6, 6)
    found = minimum_norm.run(
        Constant().eval(),
        x,
        torch.ones(6, dtype=torch.int64),
        minimum_norm.Params(**QUICK),
        attack_context(),
    )
    assert found.distances.tolist() == [float("inf")] * 6
    assert found.components["all"].all()
    assert found.max_perturbation == 0.0


def test_searches_also_move_towards_misclassified_images():
    """All attacked images have one class. An image of the other class is misclassified."""

    class Marked(nn.Module):
        """Class 1 only for images close to one pattern, which a search cannot find by chance."""

        def forward(self, x):
            away = (x - pattern).abs().amax((1, 2, 3))
            return torch.stack([0 * away, (away < 0.05).float() + 0 * away], 1)

    generator = torch.Generator().manual_seed(8)
    pattern, *x = torch.rand(5, 1, 1, 6, 6, generator=generator)
    x = torch.cat(x)
    model, y = Marked().eval(), torch.zeros(4, dtype=torch.int64)
    assert distances(model, x, y).isinf().all()
    found = distances(model, x, y, images=torch.cat([x, pattern]))
    assert torch.allclose(found, (x - pattern).abs().amax((1, 2, 3)) - 0.05, atol=2e-3)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.6)])
def test_attack_is_at_least_as_strong_as_its_searches(norm, eps, known_network):
    model, part = known_network
    x, y = part.x_NCHW[:80], part.y_N[:80]
    together = distances(model, x, y, norm=norm, eps=eps)
    params = fmn.Params(steps=QUICK["fmn_steps"])
    alone = fmn.run(model, x, y, params, attack_context(norm, eps)).distances
    assert (together <= alone).all()
    assert (together < 0.98 * alone).any()


def test_ladder_by_hand():
    assert minimum_norm.ladder(0.25, 1.0, 4) == pytest.approx([0.125, 0.25, 0.5, 1.0])
    assert minimum_norm.ladder(0.25, 1.0, 4)[1::2] == [0.25, 1.0]  # exactly
    assert minimum_norm.ladder(0.01, 1.0, 3) == [0.005, 0.01, 1.0]
    assert minimum_norm.ladder(1.0, 1.0, 5) == [0.5, 1.0]
    assert minimum_norm.ladder(9.0, 6.0, 5) == [3.0, 6.0]


def test_points_within_a_radius_are_the_nearest_to_the_target():
    x, target = torch.full((2, 1, 1, 2), 0.5), torch.tensor([[[[0.9, 0.6]]], [[[0.0, 0.5]]]])
    radius = torch.tensor([0.2, 1.0])
    box = minimum_norm.within(x, target, radius, "Linf")
    assert torch.allclose(box, torch.tensor([[[[0.7, 0.6]]], [[[0.0, 0.5]]]]))
    ball = minimum_norm.within(x, target, radius, "L2")
    share = 0.2 / (0.4**2 + 0.1**2) ** 0.5
    wanted = torch.tensor([[[[0.5 + 0.4 * share, 0.5 + 0.1 * share]]], [[[0.0, 0.5]]]])
    assert torch.allclose(ball, wanted)


def test_distances_are_those_of_images_that_break_the_network(known_network, monkeypatch):
    """Every length belongs to an image in [0,1] that the network misclassifies."""
    model, part = known_network
    x, y = part.x_NCHW[:30], part.y_N[:30]
    shown = []
    hook = model.register_forward_hook(
        lambda _, inputs, logits: shown.append((inputs[0].detach(), logits.detach()))
    )
    try:
        found = distances(model, x, y)
    finally:
        hook.remove()
    shortest = torch.full((30,), torch.inf)
    for images, logits in shown:
        # The original image of a version is not known. The nearest image gives a lower bound.
        apart = (images[:, None] - x).flatten(2).abs().amax(2)
        apart[logits.argmax(1)[:, None] == y] = torch.inf
        shortest = torch.minimum(shortest, apart.amin(0))
    assert (found >= shortest - 1e-6).all()


class Killed(RuntimeError):
    pass


def test_a_resumed_run_gives_the_same_distances(known_network, tmp_path, monkeypatch):
    model, part = known_network
    params = minimum_norm.Params(**QUICK)
    x, y = part.x_NCHW[:45], part.y_N[:45]
    whole = minimum_norm.run(model, x, y, params, attack_context(batch_size=20))
    searched = minimum_norm._Search.distances
    calls = itertools.count()

    def killed(self, *images):
        if next(calls) == 2:
            raise Killed
        return searched(self, *images)

    monkeypatch.setattr(minimum_norm._Search, "distances", killed)
    kept = {"cache": Cache(tmp_path, "one network"), "batch_size": 20}
    with pytest.raises(Killed):
        minimum_norm.run(model, x, y, params, attack_context(**kept))
    reports = []
    resumed = minimum_norm.run(model, x, y, params, attack_context(**kept, report=reports.append))
    assert "40 of 45 images taken from an earlier run" in reports
    assert next(calls) == 4  # only one batch was searched again
    assert torch.equal(resumed.distances, whole.distances)
    other = minimum_norm.Params(**QUICK | {"steps": 11})
    minimum_norm.run(model, x[:1], y[:1], other, attack_context(**kept))
    assert next(calls) == 6  # other settings do not use the cache


def test_out_of_memory_halves_the_batches(known_network):
    network, part = known_network

    class Small(nn.Module):
        def forward(self, x):
            if len(x) > 16:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return network(x)

    reports = []
    found = distances(
        Small().eval(), part.x_NCHW[:50], part.y_N[:50], report=reports.append, batch_size=50
    )
    assert found.isfinite().all()
    assert any("out of memory: batches of" in text for text in reports)


def test_passes_are_those_of_an_image_that_survives():
    seen = []

    class Constant(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return 0 * x.flatten(1)[:, :2] + torch.tensor([1.0, 0.0])

    x, y = torch.rand(8, 1, 6, 6), torch.zeros(8, dtype=torch.int64)
    params = minimum_norm.Params(fmn_steps=7, radii=4, steps=5, restarts=2, queries=30)
    minimum_norm.run(Constant().eval(), x, y, params, attack_context())
    backward, forward = minimum_norm.passes(params)
    assert backward == 2 * 7 + 4 * 5 * 2
    # Nothing is found, so no perturbation is shortened. Random search makes a few more queries.
    assert 7 + 4 * (5 * 2 + 30) < sum(seen) / 8 <= backward + forward


def test_attack_gets_all_images_of_the_evaluation(known_network, monkeypatch):
    """An attack may move towards all images of the evaluation."""
    model, part = known_network
    labels = part.y_N[:20].clone()
    labels[1:] = (labels[1:] + 1) % 10  # only one label is correct, so only this image is attacked
    attacks = [
        Attack("clean", "clean", minimum_norm.AttackParams(), "Linf", EPS),
        Attack("minimum_norm", "minimum_norm", minimum_norm.Params(**QUICK), "Linf", 0.01),
    ]
    given = []
    searched = minimum_norm._Search.distances

    def watched(self, pool, classes):
        given.append(pool)
        return searched(self, pool, classes)

    monkeypatch.setattr(minimum_norm._Search, "distances", watched)
    _, result = attack_model(
        model,
        Part(part.x_NCHW[:20], labels),
        attacks,
        seed=0,
        batch_size=20,
        device=CPU,
    )
    assert torch.equal(given[0], part.x_NCHW[:20])
    assert result.outcome.distances.shape == (1,)
    lengths = image_outcomes(result, Part(part.x_NCHW[:20], labels))["minimum_norm.distance"]
    assert np.flatnonzero(lengths).tolist() == [0]
