"""The moving average of weights, against one that is written out, and its zeros."""

import contextlib

import pytest
import torch
from torch import nn

from robsparse.networks import weights
from robsparse.sparsity.averaging import WeightAverage
from robsparse.sparsity.layers import nonzero_count, prunable
from robsparse.sparsity.masks import apply_masks, magnitude_masks, plain_state
from robsparse.study.cells import Layout
from robsparse.training import loop, recorder, validation
from robsparse.training.checkpoints import Interrupted


@pytest.fixture
def one(study_data, load_study, tmp_path):
    """one(method, objective) -> the study with an average, its cell, a new folder."""

    def make(method, objective="natural"):
        study_data["training"] |= {"batch_size": 200, "ema": {"decay": 0.6}}
        study_data["grid"] |= {"methods": [method], "objectives": [objective]}
        study = load_study(study_data)
        (cell,) = (cell for cell in study.cells() if cell.method == method)
        return study, cell, Layout(tmp_path / "run")

    return make


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize("decay", [0.2, 0.9])
def test_average_by_hand(decay):
    """d = 1/10, 2/11, 3/12, ... until it reaches the decay."""
    model = network()
    average = WeightAverage(model, decay)
    average.restart(model)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for t in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.rand_like(parameter))
        model(torch.rand(4, 1, 3, 3))  # moves the statistics
        average.update(model)
        d = min(decay, [1 / 10, 2 / 11, 3 / 12, 4 / 13][t])
        for name, parameter in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * parameter.detach()
    found = average.network.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        assert not torch.equal(found[name], model.state_dict()[name])
    for name, value in model.named_buffers():
        assert torch.equal(found[name], value)


def test_zeros_are_kept_and_regrown_weights_start_from_their_new_value():
    model = nn.Linear(4, 1, bias=False)
    average = WeightAverage(model, 0.1)  # d is 0.1 throughout
    path = [[1.0, 1, 1, 0], [2, 0, 2, 3], [3, 5, 0, 4], [0, 7, 9, 0]]
    expected = [[1.0, 1, 1, 0], [1.9, 0, 1.9, 3], [2.89, 5, 0, 3.9], [0, 6.8, 9, 0]]
    for step, (row, mean) in enumerate(zip(path, expected, strict=True)):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([row]))
        average.update(model) if step else average.restart(model)
        torch.testing.assert_close(average.network.weight, torch.tensor([mean]))
        assert torch.equal(average.network.weight == 0, model.weight == 0)


def test_average_is_of_the_masked_weights_and_the_model_is_left_alone():
    model = network()
    average = WeightAverage(model, 0.5)
    masks = magnitude_masks(model, 0.5)
    apply_masks(model, masks)
    average.restart(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average.update(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert average.network.state_dict().keys() == plain_state(model).keys()
    for name, module in prunable(average.network).items():
        assert torch.equal(module.weight != 0, masks[name])
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


@pytest.mark.parametrize("method", ["dense", "bcs", "set"])
def test_what_is_validated_and_exported_is_a_slow_average_of_all_steps(method, one, monkeypatch):
    """The slow one keeps every weight of every step, and goes back to where it became active."""
    history, validated, ordinary = [], [], loop.update

    def update(run, stage):
        if not history:
            history.append(plain_state(run.model))
        ordinary(run, stage)
        history.append(plain_state(run.model))

    def validate(model, *_):
        validated.append(plain_state(model))
        return {"val_clean": 0.5, "val_robust": 0.5}

    monkeypatch.setattr(loop, "update", update)
    monkeypatch.setattr(recorder, "validate", validate)
    study, cell, layout = one(method)
    loop.train_cell(study, cell, layout, device="cpu")
    expected = dict(history[0])
    for t, state in enumerate(history[1:]):
        d = min(0.6, (1 + t) / (10 + t))
        for name, now in state.items():
            if now.dim() < 2:
                running = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
                expected[name] = now if running else d * expected[name] + (1 - d) * now
                continue
            was, is_active = history[t][name] != 0, now != 0
            mean = torch.where(was, d * expected[name] + (1 - d) * now, now)
            expected[name] = torch.where(is_active, mean, 0.0)
    model = WeightAverage(prepared_model(study, cell, layout), 0.0).network
    weights.load_into(model, layout.model(cell, "last"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(validated[-1][name], value)
    last = sum(int((history[-1][f"{n}.weight"] != 0).sum()) for n in prunable(model))
    assert nonzero_count(model) == last


def prepared_model(study, cell, layout):
    return loop.prepare_session(study, cell, layout, torch.device("cpu")).run.model


@pytest.mark.parametrize("method", ["bcs", "hydra"])
def test_an_interrupted_average_goes_on_to_the_same_bits(method, one):
    study, cell, layout = one(method, "at")
    start = study.starting_cell(cell)
    if start:
        loop.train_cell(study, start, layout, device="cpu")
    loop.train_cell(study, cell, layout, device="cpu")
    whole = [layout.model(cell, s).read_bytes() for s in ("best_val", "last")]
    layout.training(cell).unlink()
    stops = 0
    while not layout.training(cell).exists():
        with contextlib.suppress(Interrupted):
            loop.train_cell(study, cell, layout, device="cpu", max_steps=3)
        stops += 1
    assert stops > 1
    assert [layout.model(cell, s).read_bytes() for s in ("best_val", "last")] == whole


def test_without_the_setting_nothing_is_averaged(study_data, load_study, tmp_path):
    study = load_study(study_data)
    session = loop.prepare_session(study, study.cells()[0], Layout(tmp_path), torch.device("cpu"))
    assert session.run.average is None
    assert session.run.exported is session.run.model


def test_methods_start_from_the_average_of_the_dense_network(one):
    study, cell, layout = one("lwm")
    dense = study.starting_cell(cell)
    loop.train_cell(study, dense, layout, device="cpu")
    session = loop.prepare_session(study, cell, layout, torch.device("cpu"))
    model = WeightAverage(session.run.model, 0.0).network
    weights.load_into(model, layout.model(dense, "last"))
    assert all(
        torch.equal(value, session.run.model.state_dict()[name])
        for name, value in model.state_dict().items()
    )
    found = validation.validate(model.eval(), session.held_out, session.attacker, 1)
    assert 0 <= found["val_clean"] <= 1
