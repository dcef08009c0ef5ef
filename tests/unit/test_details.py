"""Robust accuracy at every eps, from the outcomes of all attacks of one norm."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from robsparse.figures.data import statistics
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import Group
from robsparse.figures.plots import details, style
from robsparse.study import loading
from robsparse.study.cells import Cell

INF = np.inf
STUDY = {
    "study": "made_up",
    "title": "Made-up numbers",
    "grid": {
        "datasets": ["digits"],
        "archs": ["small_cnn"],
        "objectives": ["at"],
        "methods": ["bcs", "dense"],
        "sparsities": [0.9],
        "seeds": [0, 1],
    },
    "threat": {"eps": 0.1},
    "training": {"crafting": {"step_size": 0.05}},
    "evaluation": {
        "n_examples": 5,
        "attacks": {
            "far": {"base": "pgd", "eps": 0.3},
            "round": {"base": "pgd", "norm": "L2", "eps": 0.5},
            "minimum_norm": {},
        },
        "selections": {
            "best_val": ["clean", "minimum_norm", "autoattack", "far", "round"],
            "last": ["clean", "fgsm"],
        },
    },
}
CELL = Cell("digits", "small_cnn", "bcs", "at", 0.9, 0)


@dataclass
class Outcomes:
    """Artificial outcomes: the same for each network, except for those in `of_cell`."""

    robust: dict[str, list]
    lengths: dict[str, list]
    of_cell: dict[Cell, "Outcomes"] = field(default_factory=dict)

    def correct(self, cell, selection, attack):
        found = self.of_cell.get(cell, self).robust.get(attack)
        return None if found is None or selection != "best_val" else np.array(found, dtype=bool)

    def distances(self, cell, selection, attack):
        found = self.of_cell.get(cell, self).lengths.get(attack)
        if found is None or selection != "best_val":
            return None
        return np.array(found, dtype=np.float32)


class Made:
    """A Material with only the fields that these figures use."""

    primary = "best_val"
    line = Material.line

    def __init__(self, outcomes: Outcomes, **changes) -> None:
        self.study = loading.validate(STUDY | changes, "made_up.yaml")
        self.outcomes = outcomes
        keys = {"dataset": "digits", "arch": "small_cnn", "objective": "at"}
        lines = [("dense", 0.0, 0.6), ("bcs", 0.9, 0.4)]
        self.summary = pd.DataFrame(
            keys
            | {"method": m, "sparsity": s, "autoattack_accuracy": a}
            | {"selection": "best_val", "reliability": "fine", "seeds": 2}
            for m, s, a in lines
        )

    def chance(self, group: Group) -> float:
        return 0.25


def smallest(outcomes, norm="Linf"):
    return details.smallest_perturbations(Made(outcomes), CELL, norm)


def test_perturbation_of_a_broken_image_is_at_most_the_eps_of_the_attack():
    found = smallest(
        Outcomes(
            robust={
                "clean": [1, 1, 1, 1, 0],
                "minimum_norm": [1, 0, 1, 1, 0],
                "autoattack": [0, 0, 1, 1, 0],  # eps 0.1
                "far": [0, 0, 0, 1, 0],  # eps 0.3
                "round": [0, 0, 0, 0, 0],  # another norm
            },
            lengths={"minimum_norm": [0.8, 0.05, 0.8, INF, 0.0]},
        )
    )
    assert found.tolist() == [0.1, pytest.approx(0.05), 0.3, INF, 0.0]


def test_a_norm_without_measured_lengths_has_no_curve():
    outcomes = Outcomes({"round": [1] * 5}, {"minimum_norm": [0.2] * 5})
    assert smallest(outcomes, "L2") is None
    assert smallest(Outcomes({"autoattack": [1] * 5}, {})) is None


flags = arrays(bool, 5)
lengths = arrays(np.float32, 5, elements=st.floats(0, 1, width=32) | st.just(INF))


@given(lengths, flags, flags, flags)
def test_curve_is_at_most_the_accuracy_under_each_attack(measured, ours, strongest, far):
    """This is checked at the eps of every attack of the norm. The curve never rises."""
    own = np.where(measured > np.float32(0.1), True, ours)
    robust = {"minimum_norm": own, "autoattack": strongest, "far": far}
    found = smallest(Outcomes(robust, {"minimum_norm": measured}))
    eps, share = details.curve(found[None])
    assert (np.diff(share) <= 0).all()
    at = lambda value: share[np.searchsorted(eps, value, side="right") - 1]  # noqa: E731
    for name, value in (("minimum_norm", 0.1), ("autoattack", 0.1), ("far", 0.3)):
        assert at(value) <= np.mean(robust[name]) + 1e-12
    assert (found <= measured).all()


def draw(monkeypatch, outcomes, **changes):
    monkeypatch.setattr(details, "plot_caption", lambda *_, **__: "A caption.")
    with style.applied():
        return details.accuracy_against_eps(Made(outcomes, **changes))


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_plot_shows_the_bound_the_strongest_attack_and_chance(monkeypatch):
    dense = Outcomes({"clean": [1] * 5, "autoattack": [1, 1, 1, 0, 0]}, {})
    dense.lengths["minimum_norm"] = [INF] * 5  # nothing breaks it further
    outcomes = Outcomes(
        {"clean": [1] * 5, "autoattack": [1, 1, 0, 0, 0]},
        {"minimum_norm": [0.2, 0.4, 0.3, 0.05, 0.1]},
        {Cell("digits", "small_cnn", "dense", "at", 0.0, seed): dense for seed in (0, 1)},
    )
    figure = draw(monkeypatch, outcomes)
    lines = lines_of(figure)
    ours, theirs = lines["BCS"], lines["Dense"]
    x, y = ours.get_data()
    assert x[:-1] == pytest.approx([0, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.4, 0.4])
    assert y[-2] == y[-1] == 0
    eps = 0.1
    for line, level in ((ours, 40), (theirs, 60)):
        x, y = line.get_data()
        assert y[np.searchsorted(x, eps, side="right") - 1] == pytest.approx(level)
        assert line.get_drawstyle() == "steps-post"
    # The curve of the constant network is horizontal up to the edge of the panel.
    x, y = theirs.get_data()
    assert y[-1] == pytest.approx(60)
    assert x[-1] > figure.axes[0].get_xlim()[1] == pytest.approx(0.4)
    assert lines["chance"].get_ydata()[0] == 25
    message = " ".join(figure.caption)
    assert "upper bound" in message
    assert "Minimum norm, AutoAttack, far" in message
    assert "round" not in message


def test_band_is_the_interval_of_the_accuracy_at_each_eps(monkeypatch):
    lengths = {0: [0.2, 0.4, 0.3, 0.05, 0.1], 1: [0.1, 0.4, 0.2, 0.05, INF]}
    seeds = [Outcomes({"clean": [1] * 5}, {"minimum_norm": lengths[seed]}) for seed in (0, 1)]
    cells = {Cell("digits", "small_cnn", "bcs", "at", 0.9, seed): seeds[seed] for seed in (0, 1)}
    figure = draw(monkeypatch, Outcomes({}, {}, cells))
    [band] = figure.axes[0].collections
    ends = {}
    for x, y in band.get_paths()[0].vertices:
        ends.setdefault(round(float(x), 9), set()).add(round(float(y), 6))
    stacked = np.stack([np.array(lengths[seed], dtype=np.float32) for seed in (0, 1)])
    assert len(ends) == details._BAND_POINTS
    # At an eps that is a length, rounding decides on which side it is.
    clear = [eps for eps in ends if np.abs(stacked - eps).min() > 1e-6]
    assert len(clear) > 7
    for eps in clear:
        found = ends[eps]
        wanted = statistics.accuracy_interval(stacked > eps)
        assert sorted({min(found), max(found)}) == pytest.approx(
            sorted({100 * end for end in wanted}), abs=1e-4
        )


def test_plot_of_a_study_without_lengths_is_a_message(monkeypatch):
    evaluation = {"n_examples": 5, "selections": {"best_val": ["clean", "pgd"]}}
    figure = draw(monkeypatch, Outcomes({}, {}), evaluation=evaluation)
    assert "No attack" in figure.axes[0].texts[0].get_text()
