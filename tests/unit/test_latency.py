"""The latency of a network: what is timed, and where it is recorded and printed."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils import benchmark

from robsparse.base.files import write_json
from robsparse.evaluation import measure
from robsparse.evaluation.evaluate import evaluate_cell
from robsparse.networks import construct, weights
from robsparse.records.evaluation_record import read_record
from robsparse.study import fingerprints
from robsparse.study.cells import Layout


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock(seconds)` moves; it times every pass."""
    now = [0.0]
    monkeypatch.setattr(benchmark, "timer", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_latency_is_the_median_of_passes_with_one_image_after_a_warm_up(clock):
    passes, seen = itertools.count(), []

    class Timed(nn.Module):
        def forward(self, x_NCHW):
            seen.append((tuple(x_NCHW.shape), torch.is_grad_enabled()))
            number = next(passes)
            clock(100.0 if number < measure.WARM_UP else 0.001 * (number % 3 + 1))
            return x_NCHW.flatten(1)

    found = measure.latency_ms(Timed(), torch.rand(8, 1, 2, 2), folded=False)
    assert found == pytest.approx(2.0)
    assert set(seen) == {((1, 1, 2, 2), False)}
    assert len(seen) == measure.WARM_UP + measure.REPEATS


def test_folded_view_is_timed(clock, monkeypatch):
    view = nn.Flatten()
    monkeypatch.setattr(measure.folding, "folded_view", lambda network, x: view)
    view.register_forward_hook(lambda *_: clock(0.5))
    assert measure.latency_ms(nn.Identity(), torch.rand(2, 1, 2, 2), folded=True) == 500


@pytest.mark.parametrize("wanted", [False, True])
def test_latency_is_in_every_row_if_the_study_measures_it(
    wanted, study_data, load_study, tmp_path, monkeypatch
):
    monkeypatch.setattr("robsparse.evaluation.evaluate.latency_ms", lambda *_, **__: 1.25)
    study_data["evaluation"] |= {"latency": wanted, "sanity_checks": {"n_examples": 0}}
    study_data["evaluation"]["selections"] = {"last": ["clean", "fgsm"]}
    study, layout = load_study(study_data), Layout(tmp_path / "results")
    cell = study.cells()[0]
    network = construct.build(study, cell, (1, 8, 8), 10)
    weights.save(layout.model(cell, "last"), network.state_dict())
    write_json(layout.training(cell), {"cost": None, "curve": []})
    rows = read_record(evaluate_cell(study, cell, "last", layout)).rows
    assert [row.latency_ms for row in rows] == [1.25 if wanted else None] * 2


def test_only_a_study_that_measures_it_has_another_fingerprint(study_data, load_study):
    digests = []
    for settings in ({}, {"latency": False}, {"latency": True}):
        study_data["evaluation"] |= settings
        study = load_study(study_data)
        digests.append(fingerprints.evaluation(study, study.cells()[0], "last").digest)
    assert digests[0] == digests[1] != digests[2]
