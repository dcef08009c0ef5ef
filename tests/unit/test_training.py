"""The training loop against a slow loop, and what the stages may change."""

import contextlib
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robsparse import datasets, models
from robsparse.base.errors import TrainingError, UsageError
from robsparse.base.files import file_checksum, write_record
from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.kernels.library import instructions
from robsparse.networks import construct, weights
from robsparse.records.training_record import read_training
from robsparse.schema.threat import Crafting
from robsparse.schema.training import Fit
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.sparsity.masks import plain_state
from robsparse.study.cells import Cell, Layout, derive_seed
from robsparse.study.cost import PASSES, passes_per_epoch
from robsparse.training import loop, objectives, recorder, validation
from robsparse.training import session as training_session
from robsparse.training.checkpoints import Interrupted, StopRequest
from robsparse.training.objectives import Attacker
from robsparse.training.resuming import Position, RunState
from robsparse.training.session import prepare_session
from robsparse.training.stages import FixedMaskStage, Stage, begin_stage, schedule_factor
from robsparse.training.validation import guessing_accuracy, validate

CPU = torch.device("cpu")


@pytest.fixture
def one(study_data, load_study, tmp_path):
    """one(method, **changes of the grid) -> the study, the cell of that method, and the folder."""

    def make(method, **grid):
        study_data["grid"] |= {"methods": [method]} | grid
        study = load_study(study_data)
        (cell,) = (cell for cell in study.cells() if cell.method == method)
        return study, cell, Layout(tmp_path / "run")

    return make


def take_step(session, stage, index, factor=1.0):
    """One step on the training images with these indices."""
    loop.set_learning_rate(session.run, stage, factor)
    batch = session.batches.train[index]
    attacker = loop.attacker_at(session, Position())
    loss = loop.compute_gradients(session.run, stage, session.objective, attacker, batch)
    loop.update(session.run, stage)
    return loss


def fresh(study, cell):
    """The initial network and the splits, without the session."""
    splits = datasets.load("digits", study.datasets["digits"])
    torch.manual_seed(derive_seed("init", "small_cnn", cell.seed))
    model = models.build("small_cnn", study.archs["small_cnn"], splits.image_shape, splits.classes)
    return model, splits


def slow_natural_training(study, cell, fit):
    """SGD on plain tensors: order, schedule, decay, momentum."""
    model, splits = fresh(study, cell)
    model.train()
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    size = study.training.batch_size
    steps_per_epoch = len(splits.train) // size
    curve = []
    for epoch in range(fit.epochs):
        curve.append(0.0)
        order = torch.Generator().manual_seed(derive_seed("order", "digits", cell.seed, epoch))
        shuffled = torch.randperm(len(splits.train), generator=order)
        for i in range(steps_per_epoch):
            share = (epoch * steps_per_epoch + i) / (fit.epochs * steps_per_epoch)
            if fit.schedule == "cosine":
                factor = (1 + math.cos(math.pi * share)) / 2
            else:
                factor = 0.1 ** ((share >= 0.5) + (share >= 0.75))
            batch = shuffled[i * size : (i + 1) * size]
            loss = F.cross_entropy(model(splits.train.x_NCHW[batch]), splits.train.y_N[batch])
            gradients = torch.autograd.grad(loss, parameters)
            curve[-1] += loss.item() / steps_per_epoch
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    if fit.decay == "coupled":
                        step = g + fit.weight_decay * p
                    else:
                        p.mul_(1 - fit.weight_decay * factor)
                        step = g
                    v.mul_(fit.momentum).add_(step)
                    p.sub_(fit.lr * factor * (step + fit.momentum * v if fit.nesterov else v))
    return model.state_dict(), curve


@pytest.mark.parametrize(
    ("decay", "schedule", "nesterov"),
    [
        ("coupled", "cosine", False),
        ("sgdw", "step", False),
        ("sgdw", "cosine", False),
        ("coupled", "step", True),
        ("sgdw", "cosine", True),
    ],
)
def test_dense_training_equals_a_slow_loop(decay, schedule, nesterov, study_data, one):
    study_data["methods"]["dense"]["pretrain"] = {
        "epochs": 2,
        "lr": 0.05,
        "schedule": schedule,
        "decay": decay,
        "weight_decay": 0.02,
        "momentum": 0.8,
        "nesterov": nesterov,
    }
    study, cell, layout = one("dense", objectives=["natural"])
    loop.train_cell(study, cell, layout, device="cpu")
    expected, losses = slow_natural_training(study, cell, study.methods["dense"].pretrain)
    model, _ = fresh(study, cell)
    weights.load_into(model, layout.model(cell, "last"))
    curve = json.loads(layout.training(cell).read_text())["curve"]
    assert [point["epoch"] for point in curve] == [1, 2]
    assert [point["loss"] for point in curve] == pytest.approx(losses, rel=1e-3)
    halfway = {"cosine": 0.5, "step": 0.1}[schedule]
    assert [point["lr"] for point in curve] == pytest.approx([0.05, 0.05 * halfway])
    assert {point["active_weights"] for point in curve} == {weight_count(model)}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_adversarial_training_crafts_each_batch_with_the_crafting_generator(study_data, one):
    """One step of `at` by hand, with a generator that depends on data and objective."""
    study, cell, layout = one("dense")
    session = prepare_session(study, cell, layout, CPU)
    (stage,) = session.stages
    session.run.optimizer = torch.optim.SGD(session.run.model.parameters(), lr=stage.fit.lr)
    batch = torch.arange(16)
    found = take_step(session, stage, batch)
    model, splits = fresh(study, cell)
    generator = torch.Generator().manual_seed(derive_seed("craft", "digits", "at", 0))
    attacker = Attacker(study.threat.eps, study.training.crafting, generator)
    x, y = splits.train.x_NCHW[batch], splits.train.y_N[batch]
    adversarial = attacker.attack_labels(model.train(), x, y)
    assert found == pytest.approx(F.cross_entropy(model(adversarial), y).item())


def test_loss_that_is_not_finite_stops_with_stage_and_epoch(one):
    study, cell, layout = one("dense")
    session = prepare_session(study, cell, layout, CPU)
    session = replace(session, objective=lambda model, x, *_: model(x).sum() * float("nan"))
    state = RunState(session)
    with pytest.raises(TrainingError, match="loss is nan in stage pretrain, epoch 1"):
        loop.train(session, state, StopRequest())
    assert state.position.step == 1  # at once, not at the end of the epoch
    assert not layout.model(cell, "last").exists()


@pytest.mark.parametrize("tensor", ["0.weight", "1.running_var"])
def test_a_network_that_is_not_finite_after_the_last_step_is_refused(tensor, one, monkeypatch):
    """No later loss would show it."""
    study, cell, layout = one("dense", objectives=["natural"])
    ordinary = loop.update

    def spoil(run, stage):
        ordinary(run, stage)
        if run.step == run.steps - 1:
            run.model.state_dict()[tensor].view(-1)[0] = math.inf

    monkeypatch.setattr(loop, "update", spoil)
    with pytest.raises(
        TrainingError, match=f"{cell.key}: '{tensor}' holds NaN .* in stage pretrain"
    ):
        loop.train_cell(study, cell, layout, device="cpu")
    assert not layout.model(cell, "last").exists()
    assert "holds NaN" in layout.failed(cell).read_text()


def test_scores_that_are_not_finite_are_one_line_with_cell_stage_and_epoch(one, monkeypatch):
    study, cell, layout = one("snip", objectives=["natural"])
    ordinary = loop.compute_gradients

    def spoil(run, stage, *rest):
        loss = ordinary(run, stage, *rest)
        for parameter in run.optimizer.param_groups[0]["params"]:
            parameter.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(loop, "compute_gradients", spoil)
    with pytest.raises(TrainingError) as caught:
        loop.train_cell(study, cell, layout, device="cpu")
    assert str(caught.value).startswith(f"{cell.key}: ")
    assert "scores of weights are not finite in stage train, epoch 1" in str(caught.value)


# ---------------------------------------------------------------- the same bits


class Rolls(torch.nn.Module):
    """Draws from all global generators that an external model may use."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (1 + (torch.rand(()).item() + np.random.rand() + random.random()) / 10)  # noqa: NPY002


@pytest.fixture
def restless(monkeypatch):
    """Every network has dropout and uses global random numbers in training."""
    build = construct.build

    def built(*args):
        return torch.nn.Sequential(torch.nn.Dropout(0.2), Rolls(), *build(*args))

    monkeypatch.setattr(construct, "build", built)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("every", [1, 4])
def test_networks_with_dropout_have_the_same_bits_after_any_number_of_stops(every, study_data, one):
    study_data["training"]["batch_size"] = 200
    study_data["methods"]["bcs"]["train"]["epochs"] = 2
    study, cell, layout = one("bcs")
    loop.train_cell(study, cell, layout, device="cpu")
    whole = layout.model(cell, "last").read_bytes()
    layout.training(cell).unlink()
    stops = 0
    while not layout.training(cell).exists():
        torch.manual_seed(stops)  # as in another process
        np.random.seed(stops)  # noqa: NPY002
        random.seed(stops)
        with contextlib.suppress(Interrupted):
            loop.train_cell(study, cell, layout, device="cpu", max_steps=every)
        stops += 1
    assert stops > 2
    assert layout.model(cell, "last").read_bytes() == whole


@pytest.mark.parametrize("every", [1, 5])
def test_momentum_is_restored_to_the_right_parameter_after_a_masked_stage(
    every, study_data, one, monkeypatch
):
    """The order of the parameters is the same in all stages."""
    stages = [
        FixedMaskStage("prune", Fit(epochs=1, lr=0.1)),
        Stage(Fit(epochs=1, lr=0.1, momentum=0.9)),
    ]
    monkeypatch.setattr(training_session, "make_stages", lambda *_: stages)
    study_data["training"]["batch_size"] = 200
    study, cell, layout = one("dense", objectives=["natural"])
    loop.train_cell(study, cell, layout, device="cpu")
    whole = layout.model(cell, "last").read_bytes()
    layout.training(cell).unlink()
    while not layout.training(cell).exists():
        with contextlib.suppress(Interrupted):
            loop.train_cell(study, cell, layout, device="cpu", max_steps=every)
    assert layout.model(cell, "last").read_bytes() == whole


# ---------------------------------------------------------------- methods that start from dense


@pytest.fixture
def pruned(study_data, one):
    """pruned(method) -> a trained cell. Its dense starting network is trained too."""

    def train(method, **grid):
        study, cell, layout = one(method, **grid)
        for each in (study.starting_cell(cell), cell):
            loop.train_cell(study, each, layout, device="cpu")
        return study, cell, layout

    return train


def load(study, cell, layout):
    model, _ = fresh(study, cell)
    weights.load_into(model, layout.model(cell, "last"))
    return model


def test_hydra_prune_stage_changes_only_scores_and_batch_norm(pruned):
    study, cell, layout = pruned("hydra")
    dense = load(study, study.starting_cell(cell), layout)
    session = prepare_session(study, cell, layout, CPU)
    prune, run = session.stages[0], session.run
    with torch.no_grad():
        run.model[-1].bias.fill_(0.5)
    prune.before_fit(run)
    scores = {n: p.detach().clone() for n, p in run.model.named_parameters() if "score" in n}
    run.optimizer = torch.optim.SGD(prune.parameters(run.model), lr=0.5, weight_decay=0.1)
    first = [module.weight != 0 for module in prunable(run.model).values()]
    for i in range(10):
        take_step(session, prune, torch.arange(32 * i, 32 * (i + 1)))
    for name, module in prunable(run.model).items():
        original = module.parametrizations.weight.original
        assert torch.equal(original, dense.get_parameter(f"{name}.weight"))
    assert torch.equal(run.model[-1].bias, torch.full((10,), 0.5))
    for name, score in scores.items():
        assert not torch.equal(run.model.get_parameter(name), score)
    for name in ("1.weight", "1.bias", "7.weight"):
        assert not torch.equal(run.model.get_parameter(name), dense.get_parameter(name))
    assert any(
        not torch.equal(mask, module.weight != 0)
        for mask, module in zip(first, prunable(run.model).values(), strict=True)
    )
    assert nonzero_count(run.model) == sum(
        n - int(n * 0.9 + 1e-9) for n in (m.weight.numel() for m in prunable(run.model).values())
    )


def test_lwm_keeps_the_largest_weights_of_the_dense_network_and_trains_them(pruned):
    study, cell, layout = pruned("lwm")
    dense = prunable(load(study, study.starting_cell(cell), layout))
    for name, module in prunable(load(study, cell, layout)).items():
        before, after = dense[name].weight.detach(), module.weight.detach()
        keep = before.numel() - int(before.numel() * 0.9 + 1e-9)
        smallest = sorted(before.abs().flatten().tolist())[-keep]
        assert torch.equal(after != 0, before.abs() >= smallest)
        assert not torch.equal(after[after != 0], before[after != 0])


def test_admm_moves_the_weights_towards_their_projection(pruned, study_data):
    study_data["methods"]["admm"] |= {"rho": 5.0}
    study_data["methods"]["admm"]["admm"] |= {"epochs": 3}
    study, cell, layout = pruned("admm")
    session = prepare_session(study, cell, layout, CPU)
    stage, run = session.stages[0], session.run
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(stage.parameters(run.model), lr=0.02, momentum=0.9)

    def gap():
        return sum(
            float((module.weight.detach() - stage.Z[name]).square().sum())
            for name, module in prunable(run.model).items()
        )

    before = gap()
    for i in range(15):
        take_step(session, stage, torch.arange(32 * i, 32 * (i + 1)))
    assert gap() < 0.2 * before


def test_pruning_starts_from_the_last_weights_and_not_from_the_best(
    study_data, one, fixed_accuracies
):
    study_data["methods"]["dense"]["pretrain"]["epochs"] = 2
    study, cell, layout = one("lwm", objectives=["natural"])
    networks = fixed_accuracies([0.9, 0.1, 0.1])
    loop.train_cell(study, study.starting_cell(cell), layout, device="cpu")
    start = prepare_session(study, cell, layout, CPU).run.model.state_dict()
    assert all(torch.equal(start[name], value) for name, value in networks[1].items())
    assert not all(torch.equal(start[name], value) for name, value in networks[0].items())


@pytest.mark.parametrize("method", ["lwm", "hydra", "admm"])
def test_cost_includes_the_dense_training(method, pruned):
    study, cell, layout = pruned(method)
    own, start = (
        json.loads(layout.training(each).read_text()) for each in (cell, study.starting_cell(cell))
    )
    stages = len(study.methods[method].model_dump(include={"prune", "admm", "finetune", "retrain"}))
    assert start["cost"]["epochs"] == 1
    assert own["cost"]["epochs"] == 1 + stages
    assert [point["epoch"] for point in own["curve"]] == list(range(1, 2 + stages))
    assert own["curve"][:1] == start["curve"]
    batches = len(fresh(study, cell)[1].train) // study.training.batch_size
    passes = batches * (study.training.crafting.steps + 1)
    assert own["cost"]["forward_passes"] == passes * (1 + stages)
    assert own["cost"]["peak_active_weights"] == weight_count(load(study, cell, layout))


# ---------------------------------------------------------------- validation


def test_validation_is_repeatable_and_does_not_change_the_network(one):
    study, cell, _ = one("dense")
    model, splits = fresh(study, cell)
    model.train()
    attacker = Attacker(study.threat.eps, study.training.crafting, torch.Generator())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = attacker.generator.get_state()
    results = [validate(model, splits.validation, attacker, 2) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0]["val_robust"] <= results[0]["val_clean"]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(attacker.generator.get_state(), state)


def test_accuracies_are_those_of_the_images_in_eval_mode(one):
    study, cell, _ = one("dense")
    model, splits = fresh(study, cell)
    part = splits.validation
    model.train()
    model(
        splits.train.x_NCHW[:200]
    )  # so that running statistics differ from those of the validation batch
    attacker = Attacker(1e-9, study.training.crafting, torch.Generator())
    found = validate(model, part, attacker, 1)
    expected = float((model.eval()(part.x_NCHW).argmax(1) == part.y_N).float().mean())
    assert found["val_clean"] == found["val_robust"] == pytest.approx(expected)


def test_missing_starting_weights_give_one_line_with_the_cell_to_train(one):
    study, cell, layout = one("lwm")
    with pytest.raises(UsageError, match=r"train --cell digits/small_cnn/dense/at/s0\.0000/seed0"):
        prepare_session(study, cell, layout, CPU)


def test_validation_equals_a_slow_one(one, monkeypatch):
    seen, ordinary = [], validation.correct_count

    def count(model, x, y):
        seen.append(x)
        return ordinary(model, x, y)

    monkeypatch.setattr(validation, "correct_count", count)
    study, cell, _ = one("dense")
    model, splits = fresh(study, cell)
    part, threat = splits.validation, study.threat
    attacker = Attacker(threat.eps, study.training.crafting, torch.Generator(), "L2")
    found = validate(model, part, attacker, 3, True)
    assert validate(model, part, attacker, 3) == {
        name: found[name] for name in ("val_clean", "val_robust")
    }
    generator = torch.Generator().manual_seed(derive_seed("validate", len(part)))
    model.eval()
    start = perturb.uniform_start(part.x_NCHW, threat.eps, generator, "L2")
    images = perturb.ascend(
        model,
        part.x_NCHW,
        start,
        perturb.cross_entropy_of(part.y_N),
        eps=threat.eps,
        step_size=study.training.crafting.step_size,
        steps=3,
        norm="L2",
    )
    for name, x in (("val_clean", part.x_NCHW), ("val_robust", images)):
        right = (model(x).argmax(1) == part.y_N).sum().item()
        assert found[name] == right / len(part)
        torch.testing.assert_close(seen.pop(0), x)
    with torch.no_grad():
        assert found["val_loss"] == pytest.approx(float(F.cross_entropy(model(images), part.y_N)))


# ---------------------------------------------------------------- selection and active weights


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("objective", ["natural", "at", "mat", "trades", "mart"])
def test_a_stage_that_follows_overfitting_gets_the_accuracy_of_its_training_passes(
    objective, bn_mode, study_data, one, monkeypatch
):
    """Compared with an objective that notes the logits of its passes; images are still viewed."""
    study_data["training"]["crafting"] |= {"bn_mode": bn_mode}
    study_data["methods"]["flyingbird_plus"] = {"train": {"epochs": 2}}
    study, cell, layout = one("flyingbird_plus", objectives=[objective])
    noted, seen = [], []

    def noting(model, x, y, attacker, beta):
        passes = []

        class Noting(torch.nn.Module):
            def __call__(self, images):
                passes.append(model(images))
                return passes[-1]

        class Attacking:
            def attack_labels(self, _, *given):
                return attacker.attack_labels(model, *given)

            def attack_outputs(self, _, x):
                return attacker.attack_outputs(model, x)

        loss = ordinary(Noting(), x, y, Attacking(), beta)
        noted.append(float((passes[-1].argmax(1) == y).double().mean()))
        return loss

    ordinary = objectives.OBJECTIVES[objective]
    monkeypatch.setitem(objectives.OBJECTIVES, objective, noting)
    made = training_session.make_stages

    def make_stages(*given):
        (stage,) = made(*given)
        before_epoch = stage.before_epoch
        stage.before_epoch = lambda run: (seen.append(list(run.curve)), before_epoch(run))
        return [stage]

    monkeypatch.setattr(training_session, "make_stages", make_stages)
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    curve, steps = record["curve"], len(noted) // 2
    for epoch, point in enumerate(curve):
        own = noted[epoch * steps : (epoch + 1) * steps]
        assert point["train_accuracy"] == pytest.approx(sum(own) / steps)
        assert 0 < point["val_loss"] < 10
    assert [len(points) for points in seen] == [0, 1]
    assert seen[1] == curve[:1]
    expected = {"natural": None}.get(objective, "view" if bn_mode == "eval" else "network")
    assert record["crafted_on"] == expected


def test_no_other_stage_measures_its_training_passes(one):
    study, cell, layout = one("dense")
    loop.train_cell(study, cell, layout, device="cpu")
    for point in json.loads(layout.training(cell).read_text())["curve"]:
        assert not {"train_accuracy", "val_loss"} & {*point}


def test_curve_has_the_mean_loss_and_the_first_learning_rate_of_each_epoch(
    study_data, one, monkeypatch
):
    fit = {"epochs": 3, "lr": 0.2, "schedule": "step", "milestones": [0.3, 0.6], "gamma": 0.5}
    study_data["methods"]["dense"]["pretrain"] = fit
    study, cell, layout = one("dense", objectives=["natural"])
    losses = itertools.count(1)
    monkeypatch.setattr(
        loop,
        "compute_gradients",
        lambda *_: torch.tensor(float(next(losses)), dtype=torch.float64),
    )
    loop.train_cell(study, cell, layout, device="cpu")
    curve = json.loads(layout.training(cell).read_text())["curve"]
    steps = (next(losses) - 1) // 3
    middles = [(steps + 1) / 2 + epoch * steps for epoch in range(3)]
    assert [point["loss"] for point in curve] == pytest.approx(middles)
    assert [point["lr"] for point in curve] == pytest.approx([0.2, 0.1, 0.05])


def test_clean_passes_change_batch_norm_and_are_counted(study_data, one):
    study_data["methods"]["dense"]["pretrain"]["clean_passes"] = 2
    study, cell, layout = one("dense", objectives=["natural"])
    loop.train_cell(study, cell, layout, device="cpu")
    model, splits = fresh(study, cell)
    weights.load_into(model, layout.model(cell, "last"))
    steps = len(splits.train) // study.training.batch_size
    assert int(model[1].num_batches_tracked) == 3 * steps
    cost = json.loads(layout.training(cell).read_text())["cost"]
    assert (cost["forward_passes"], cost["backward_passes"]) == (3 * steps, steps)


def test_the_accuracy_of_the_largest_class_counts_as_guessing(one, monkeypatch):
    monkeypatch.setattr(recorder, "guessing_accuracy", lambda part: 0.25)
    made = recorder.Recorder(prepare_session(*one("dense"), CPU), recorder.TrainingRecord())
    for accuracy, count in ((0.25, 1), (0.2, 2), (0.26, 0)):
        made._check_collapse({"epoch": 1, "stage": "x", "val_clean": accuracy})
        assert made.record.collapsed == count


def test_seeds_depend_on_the_purpose_of_the_random_numbers(study_data, load_study, tmp_path):
    """Methods share initial weights and crafting; objectives, sparsities and seeds differ."""
    grid = {"methods": ["bcs", "set"], "sparsities": [0.9, 0.95], "seeds": [0, 1]}
    grid |= {"objectives": ["at", "trades"]}
    study_data["grid"] |= grid
    study, made = load_study(study_data), {}
    for method, sparsity, seed, objective in itertools.product(*grid.values()):
        cell = Cell("digits", "small_cnn", method, objective, sparsity, seed)
        session = prepare_session(study, cell, Layout(tmp_path), CPU)
        made[method, sparsity, seed, objective] = (
            session.run.model[0].weight.detach().numpy().tobytes(),
            session.attacker.generator.initial_seed(),
            session.run.generator.initial_seed(),
        )
    for key, (initial, crafting, own) in made.items():
        for other, (initial_2, crafting_2, own_2) in made.items():
            assert (initial == initial_2) == (key[2] == other[2])
            assert (crafting == crafting_2) == (key[2:] == other[2:])
            assert (own == own_2) == (key[:3] == other[:3])


@pytest.fixture
def fixed_accuracies(monkeypatch):
    """fixed_accuracies(values) -> a list of the validated networks. Validation returns `values`."""

    def tell(accuracies):
        left, networks = list(accuracies), []

        def validate(model, *_):
            networks.append(plain_state(model))
            return {"val_clean": 0.9, "val_robust": left.pop(0)}

        monkeypatch.setattr(recorder, "validate", validate)
        return networks

    return tell


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([0.1, 0.3, 0.3, 0.2], 2), ([0.2, 0.2, 0.2, 0.2], 1), ([0.0, 0.1, 0.2, 0.3], 4)],
)
def test_the_first_of_the_best_epochs_is_selected(
    accuracies, best, fixed_accuracies, study_data, one
):
    study_data["methods"]["dense"]["pretrain"]["epochs"] = 4
    study, cell, layout = one("dense", objectives=["natural"])
    networks = fixed_accuracies(accuracies)
    loop.train_cell(study, cell, layout, device="cpu")
    selected = json.loads(layout.training(cell).read_text())["selected"]
    assert selected["best_val"] == {"epoch": best, "val_robust": max(accuracies)}
    assert selected["last"] == {"epoch": 4, "val_robust": accuracies[-1]}
    for selection, index in (("best_val", best - 1), ("last", 3)):
        model, _ = fresh(study, cell)
        weights.load_into(model, layout.model(cell, selection))
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in networks[index].items())


CLEAN = [(0.5, 0.1), (0.9, 0.2), (0.9, 0.3), (0.7, 0.0)]  # clean and robust accuracy of 4 epochs


@pytest.fixture
def best_clean(study_data, monkeypatch):
    """A study that attacks best_clean; its validations find the accuracies in CLEAN."""
    study_data["methods"]["bcs"]["train"]["epochs"] = 4
    study_data["evaluation"]["selections"] |= {"best_clean": ["clean"]}
    networks = []

    def validate(model, *_):
        networks.append(plain_state(model))
        clean, robust = CLEAN[(len(networks) - 1) % 4]
        return {"val_clean": clean, "val_robust": robust}

    monkeypatch.setattr(recorder, "validate", validate)
    return networks


def test_best_clean_is_the_first_epoch_with_the_best_clean_accuracy(best_clean, one):
    study, cell, layout = one("bcs")
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    assert record["selected"] == {
        "best_val": {"epoch": 3, "val_robust": 0.3},
        "best_clean": {"epoch": 2, "val_clean": 0.9},
        "last": {"epoch": 4, "val_robust": 0.0},
    }
    for selection, index in (("best_val", 2), ("best_clean", 1), ("last", 3)):
        assert record["weights"][selection] == file_checksum(layout.model(cell, selection))
        model, _ = fresh(study, cell)
        weights.load_into(model, layout.model(cell, selection))
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in best_clean[index].items())


def test_best_clean_is_not_written_unless_it_is_attacked(fixed_accuracies, study_data, one):
    study_data["methods"]["bcs"]["train"]["epochs"] = 2
    study, cell, layout = one("bcs")
    fixed_accuracies([0.1, 0.2])
    loop.train_cell(study, cell, layout, device="cpu")
    assert set(json.loads(layout.training(cell).read_text())["selected"]) == {"best_val", "last"}
    files = [path.name for path in layout.training(cell).parent.glob("*.safetensors")]
    assert sorted(files) == ["best_val.safetensors", "last.safetensors"]


def test_best_clean_of_a_resumed_run_is_that_of_an_uninterrupted_one(best_clean, one, tmp_path):
    """Stopped in every epoch, also in those after the best one."""
    study, cell, layout = one("bcs")
    loop.train_cell(study, cell, layout, device="cpu")
    resumed = Layout(tmp_path / "resumed")
    while not resumed.training(cell).exists():
        with contextlib.suppress(Interrupted):
            loop.train_cell(study, cell, resumed, device="cpu", max_steps=5)
    for selection in ("best_val", "best_clean", "last"):
        whole = layout.model(cell, selection).read_bytes()
        assert resumed.model(cell, selection).read_bytes() == whole


def test_networks_are_validated_every_so_many_epochs_and_at_the_end(
    fixed_accuracies, study_data, one
):
    study_data["methods"]["dense"]["pretrain"]["epochs"] = 6
    study_data["training"]["validation"] = {"every": 2}
    study, cell, layout = one("dense", objectives=["natural"])
    fixed_accuracies([0.1, 0.4, 0.2, 0.3])
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    assert [p["epoch"] for p in record["curve"] if "val_robust" in p] == [1, 3, 5, 6]
    assert record["selected"]["best_val"]["epoch"] == 3


@pytest.mark.parametrize("largest", range(6))
def test_peak_active_weights_are_those_of_any_stage_and_epoch(largest, one, monkeypatch):
    """Nonzero weights are counted at the start of each stage and after each epoch."""
    counts = [7] * 6
    counts[largest] = 9

    class Counted(Stage):
        def active_weights(self, run):
            return counts.pop(0)

    stages = [Counted(Fit(epochs=2, lr=0.1)) for _ in range(2)]
    monkeypatch.setattr(training_session, "make_stages", lambda *_: stages)
    study, cell, layout = one("dense", objectives=["natural"])
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    assert record["cost"]["peak_active_weights"] == 9
    assert not counts


CHANGES = {
    "none": {},
    "batch size": {"training": {"batch_size": 50}},
    "crafting": {"training": {"crafting": {"steps": 1, "step_size": 0.05}}},
    "threat": {"threat": {"eps": 0.2}},
    "data": {"datasets": {"digits": {"validation_examples": 30, "test_examples": 800}}},
    "selections": {"evaluation": {"selections": {"best_clean": ["clean"], "last": ["clean"]}}},
    "learning rate": {"methods": {"bcs": {"train": {"epochs": 1, "lr": 0.05}}}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_of_other_settings_is_not_continued(change, study_data, one, tmp_path, capsys):
    study, cell, _ = one("bcs")
    whole, layout = Layout(tmp_path / "whole"), Layout(tmp_path / "other")
    loop.train_cell(study, cell, whole, device="cpu")
    for section, values in CHANGES[change].items():
        study_data[section] |= values
    other, *_ = one("bcs")
    with pytest.raises(Interrupted):
        loop.train_cell(other, cell, layout, device="cpu", max_steps=3)
    assert (layout.resume(cell) / "state.pt").exists()
    loop.train_cell(study, cell, layout, device="cpu")
    assert ("resuming" in capsys.readouterr().out) == (change == "none")
    for selection in ("best_val", "last"):
        assert layout.model(cell, selection).read_bytes() == (
            whole.model(cell, selection).read_bytes()
        )


# ---------------------------------------------------------------- warm-up, velocity, decay


def test_learning_rate_warms_up_by_hand():
    fit = Fit(epochs=4, lr=1.0, schedule="step", warmup=2)
    assert [schedule_factor(fit, t, 2) for t in range(8)] == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.01, 0.01]
    )


def test_eps_warms_up_only_in_networks_from_scratch(study_data, one, pruned):
    study_data["training"]["crafting"]["eps_warmup"] = 1
    study, cell, layout = pruned("lwm")
    scratch = prepare_session(study, study.starting_cell(cell), layout, CPU)
    steps = scratch.batches.steps
    found = []
    for done in (0, 1, steps - 1, steps):
        found.append(loop.attacker_at(scratch, Position(step=done)).scale)
    assert found == pytest.approx([1 / steps, 2 / steps, 1, 1])
    pruning = prepare_session(study, cell, layout, CPU)
    assert loop.attacker_at(pruning, Position()).scale == 1


def test_eps_warms_up_only_in_the_first_stage_and_over_its_epochs(study_data, one):
    study_data["methods"]["dense"]["pretrain"]["epochs"] = 3
    study_data["training"]["crafting"]["eps_warmup"] = 2
    session = prepare_session(*one("dense"), CPU)
    steps, found = session.batches.steps, []
    for stage, epoch, step in [(0, 0, 0), (0, 1, 0), (0, 1, steps - 1), (0, 2, 0), (1, 0, 0)]:
        found.append(loop.attacker_at(session, Position(stage, epoch, step)).scale)
    assert found == pytest.approx([1 / (2 * steps), (steps + 1) / (2 * steps), 1, 1, 1])


def test_scaled_attacker_stays_within_the_smaller_eps():
    attacker = Attacker(0.2, Crafting(steps=3, step_size=0.1), torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    x = torch.full((4, 1, 4, 4), 0.5)
    moved = attacker.scaled(0.25).attack_labels(model, x, torch.zeros(4, dtype=torch.int64)) - x
    assert moved.abs().max() == pytest.approx(0.05)


@pytest.mark.parametrize("velocity", ["torch", "tensorflow"])
def test_velocity_across_a_drop_of_the_learning_rate(velocity, study_data, one):
    fit = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "velocity": velocity, "epochs": 1}
    study_data["methods"]["dense"]["pretrain"] = fit
    session = prepare_session(*one("dense"), CPU)
    (stage,) = session.stages
    bias = session.run.model.get_parameter("10.bias")
    session.run.optimizer = torch.optim.SGD(session.run.model.parameters(), lr=0.1, momentum=0.5)
    session = replace(session, objective=lambda *_: bias.sum())  # gradient 1
    path, sums, v = [], [], 0.0
    position, total = 0.0, 0.0
    for factor in (1.0, 1.0, 0.1, 0.1):
        take_step(session, stage, torch.arange(4), factor)
        lr = 0.1 * factor
        v = 0.5 * v - lr  # learning rate inside the velocity
        total = 0.5 * total + 1  # learning rate outside
        position += v if velocity == "tensorflow" else -lr * total
        path.append(bias[0].item())
        sums.append(position)
    assert path == pytest.approx(sums, abs=1e-7)


@pytest.mark.parametrize("velocity", ["torch", "tensorflow"])
def test_nesterov_by_hand_across_a_drop_of_the_learning_rate(velocity, study_data, one):
    """tensorflow: v = m v - lr g, then w += m v - lr g; torch: v = m v + g, w -= lr (g + m v)."""
    fit = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "velocity": velocity, "epochs": 1}
    study_data["methods"]["dense"]["pretrain"] = fit | {"nesterov": True}
    session = prepare_session(*one("dense"), CPU)
    (stage,) = session.stages
    begin_stage(session.run, stage, session.batches.steps)
    bias = session.run.model.get_parameter("10.bias")
    session = replace(session, objective=lambda *_: bias.sum())  # gradient 1
    v, position = 0.0, 0.0
    for factor in (1.0, 1.0, 0.1, 0.1):
        take_step(session, stage, torch.arange(4), factor)
        lr = 0.1 * factor
        if velocity == "tensorflow":
            v = 0.5 * v - lr
            position += 0.5 * v - lr
        else:
            v = 0.5 * v + 1
            position -= lr * (1 + 0.5 * v)
        assert bias[0].item() == pytest.approx(position, abs=1e-7)


# ---------------------------------------------------------------- collapse


@pytest.fixture
def guessing(monkeypatch):
    """Make every validation find the accuracy of guessing, and return this accuracy."""
    monkeypatch.setattr(
        recorder, "validate", lambda model, part, *_: {"val_clean": 0.1, "val_robust": 0.0}
    )
    monkeypatch.setattr(recorder, "guessing_accuracy", lambda part: 0.11)


@pytest.mark.usefixtures("guessing")
def test_training_of_a_network_that_only_guesses_stops_with_a_failure(study_data, one, capsys):
    study_data["training"]["collapse_after"] = 3
    study_data["methods"]["bcs"]["train"]["epochs"] = 9
    study, cell, layout = one("bcs")
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    assert len(record["curve"]) == 3
    assert "training collapsed" in record["failure"]
    assert "3 validations up to epoch 3" in record["failure"]
    assert record["failure"] in capsys.readouterr().err
    for selection in ("best_val", "last"):
        assert layout.model(cell, selection).exists()


@pytest.mark.usefixtures("guessing")
def test_the_collapse_check_can_be_disabled(study_data, one):
    study_data["training"]["collapse_after"] = 0
    study_data["methods"]["bcs"]["train"]["epochs"] = 4
    study, cell, layout = one("bcs")
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    assert len(record["curve"]) == 4
    assert record["failure"] == ""


def test_one_good_validation_resets_the_count(one):
    made = recorder.Recorder(prepare_session(*one("dense"), CPU), recorder.TrainingRecord())
    point = {"epoch": 1, "stage": "pretrain"}
    for accuracy in [0.1] * 9 + [0.5] + [0.1] * 9:
        made._check_collapse(point | {"val_clean": accuracy})
    assert made.record.failure == ""


def test_a_network_that_starts_from_a_failed_network_has_a_failure(pruned):
    study, cell, layout = pruned("lwm")
    path = layout.training(study.starting_cell(cell))
    record = read_training(path)
    assert json.loads(layout.training(cell).read_text())["failure"] == ""
    write_record(path, record | {"failure": "training collapsed: x"})
    loop.train_cell(study, cell, layout, device="cpu")
    message = json.loads(layout.training(cell).read_text())["failure"]
    assert message == "started from a failed network: training collapsed: x"


def test_a_starting_network_with_a_changed_bit_is_refused(pruned):
    study, cell, layout = pruned("lwm")
    path = layout.model(study.starting_cell(cell), "last")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"last\.safetensors: damaged or changed"):
        loop.train_cell(study, cell, layout, device="cpu")


def test_guessing_accuracy():
    y_N = torch.tensor([0, 1, 1, 2])
    assert guessing_accuracy(Part(torch.zeros(4, 1, 2, 2), y_N)) == 0.5


# ---------------------------------------------------------------- robust self-training


def test_self_training_mixes_pseudo_labelled_images_into_each_batch(study_data, one, tmp_path):
    images = np.full((30, 8, 8), 255, dtype=np.uint8)  # white, so they differ from the digits
    np.savez(tmp_path / "extra.npz", images=images, labels=np.arange(30) % 10)
    study_data["training"] |= {"rst_file": str(tmp_path / "extra.npz"), "rst_fraction": 0.25}
    study, cell, layout = one("dense", objectives=["rst"])
    session = prepare_session(study, cell, layout, CPU)
    assert (session.batches.size, session.batches.extra_size) == (48, 16)
    assert session.batches.steps == len(session.batches.train) // 48
    epoch, seen = session.batches.epoch(0), []
    for step in range(session.batches.steps):
        x_NCHW, y_N = epoch.batch(step)
        white = (x_NCHW == 1).flatten(1).all(dim=1)
        assert white.tolist() == [False] * 48 + [True] * 16
        seen += y_N[white].tolist()
    assert Counter(seen[:30]) == dict.fromkeys(range(10), 3)  # every image once before a repetition
    loop.train_cell(study, cell, layout, device="cpu")
    assert json.loads(layout.training(cell).read_text())["cost"]["epochs"] == 1


@pytest.mark.parametrize("objective", ["at", "natural"])
def test_synthetic_images_fill_their_share_of_each_batch(objective, study_data, one, tmp_path):
    images = np.full((30, 8, 8), 255, dtype=np.uint8)  # white, so they differ from the digits
    np.savez(tmp_path / "made.npz", image=images, label=np.arange(30) % 10)
    made = {"synthetic_file": str(tmp_path / "made.npz"), "synthetic_fraction": 0.25}
    study_data["training"] |= made
    study, cell, layout = one("dense", objectives=[objective])
    session = prepare_session(study, cell, layout, CPU)
    assert (session.batches.size, session.batches.extra_size) == (48, 16)
    for step in range(session.batches.steps):
        x_NCHW, _ = session.batches.epoch(0).batch(step)
        white = (x_NCHW == 1).flatten(1).all(dim=1)
        assert white.tolist() == [False] * 48 + [True] * 16
    plain = study.training.model_copy(update={"synthetic_file": None})
    ratio = passes_per_epoch(objective, study.training) / passes_per_epoch(objective, plain)
    assert ratio == pytest.approx(64 / 48)  # so many more steps for the labelled images
    loop.train_cell(study, cell, layout, device="cpu")
    cost = json.loads(layout.training(cell).read_text())["cost"]
    each = PASSES[objective](study.training.crafting.steps)[0]
    assert cost["forward_passes"] == each * session.batches.steps


def test_extra_images_of_another_shape_are_refused(study_data, one, tmp_path):
    images = np.zeros((30, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", images=images, labels=np.arange(30) % 10)
    study_data["training"]["rst_file"] = str(tmp_path / "extra.npz")
    with pytest.raises(UsageError, match=r"extra\.npz: expected images of 1x8x8 .* found 1x9x9"):
        prepare_session(*one("dense", objectives=["rst"]), CPU)


# ---------------------------------------------------------------- crafted_on


class Tutorial(torch.nn.Module):
    """Uses `view`, which needs channels first. Its hook prevents a folded view."""

    def __init__(self, hooked=False, channels=1):
        super().__init__()
        self.conv, self.end = torch.nn.Conv2d(channels, 4, 3), torch.nn.Linear(144, 10)
        if hooked:
            self.conv.register_forward_hook(lambda module, x, y: y + 1)

    def forward(self, x):
        out = torch.relu(self.conv(x))
        return self.end(out.view(out.size(0), -1))


@pytest.mark.parametrize(("hooked", "used"), [(False, "view"), (True, "network")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_networks_of_any_code_train_and_their_record_has_crafted_on(  # noqa: PLR0917
    hooked, used, precision, study_data, one, monkeypatch, capsys
):
    monkeypatch.setattr(construct, "build", lambda *_: Tutorial(hooked))
    study_data["training"]["precision"] = precision
    study_data["training"]["crafting"]["precision"] = precision
    study, cell, layout = one("dense")
    with contextlib.suppress(Interrupted):
        loop.train_cell(study, cell, layout, device="cpu", max_steps=3)
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads((layout.training(cell)).read_text())
    assert (record["crafted_on"], record["kernels"]) == (used, instructions())
    out = capsys.readouterr().out
    # Once in each process, because a resumed run creates the network again.
    assert out.count("folded view: not used for this network, 'conv' has hooks") == 2 * hooked


@pytest.mark.parametrize(("network", "lines"), [(Tutorial, 1), (torch.nn.Conv2d, 0)])
def test_network_that_refuses_channels_last_gets_images_with_channels_first(
    network, lines, make_run, capsys
):
    model = network(channels=3) if network is Tutorial else network(3, 4, 3)
    run, x = make_run(model.train(), 0.0), torch.rand(9, 3, 8, 8)
    run.precision = "bf16"
    before = torch.get_rng_state()
    chosen = training_session.pick_memory_format(run, Part(x, torch.zeros(9)), CPU)
    assert chosen == (torch.contiguous_format if lines else torch.channels_last)
    model(x.contiguous(memory_format=chosen))
    assert capsys.readouterr().out.count("layout: channels first") == lines
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_crafted_on_of_an_interrupted_run_is_restored(study_data, one, monkeypatch):
    study, cell, layout = one("dense")
    with monkeypatch.context() as patch, contextlib.suppress(Interrupted):
        patch.setattr(objectives.folding, "folded_view", lambda model, *_: model)
        loop.train_cell(study, cell, layout, device="cpu", max_steps=3)
    loop.train_cell(study, cell, layout, device="cpu")
    assert json.loads((layout.training(cell)).read_text())["crafted_on"] == "network and view"
