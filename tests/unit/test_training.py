"""The one loop against a slow loop written out, and what its stages may change."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from robsparse import datasets, models, training, weights
from robsparse.cells import Layout, derive_seed
from robsparse.config import starting_cell
from robsparse.errors import UsageError
from robsparse.objectives import Attacker
from robsparse.sparsity import live_count, prunable, weight_count
from robsparse.training import Trainer, TrainingError
from robsparse.validation import validate

CPU = torch.device("cpu")


@pytest.fixture
def one(study_data, load_study, tmp_path):
    """one(method, **changes of the grid) -> the study, its cell of that method, its folder."""

    def make(method, **grid):
        study_data["grid"] |= {"methods": [method]} | grid
        study = load_study(study_data)
        (cell,) = (cell for cell in study.cells() if cell.method == method)
        return study, cell, Layout(tmp_path / "run")

    return make


def fresh(study, cell):
    """The initial network and the splits, without the trainer."""
    splits = datasets.load("digits", study.datasets["digits"])
    torch.manual_seed(derive_seed("init", "small_cnn", cell.seed))
    model = models.build("small_cnn", study.archs["small_cnn"], splits.image_shape, splits.classes)
    return model, splits


def slow_natural_training(study, cell, fit):
    """SGD written out on plain tensors: order, schedule, decay, momentum."""
    model, splits = fresh(study, cell)
    model.train()
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    size = study.training.batch_size
    steps_per_epoch = len(splits.train) // size
    for epoch in range(fit.epochs):
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
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    if fit.decay == "coupled":
                        step = g + fit.weight_decay * p
                    else:
                        p.mul_(1 - fit.weight_decay * factor)
                        step = g
                    v.mul_(fit.momentum).add_(step)
                    p.sub_(fit.lr * factor * v)
    return model.state_dict()


@pytest.mark.parametrize(
    ("decay", "schedule"), [("coupled", "cosine"), ("sgdw", "step"), ("sgdw", "cosine")]
)
def test_dense_training_equals_a_slow_loop(decay, schedule, study_data, one):
    study_data["methods"]["dense"]["pretrain"] = {
        "epochs": 2,
        "lr": 0.05,
        "schedule": schedule,
        "decay": decay,
        "weight_decay": 0.02,
        "momentum": 0.8,
    }
    study, cell, layout = one("dense", objectives=["natural"])
    training.train_cell(study, cell, layout, device="cpu")
    expected = slow_natural_training(study, cell, study.methods["dense"].pretrain)
    model, _ = fresh(study, cell)
    weights.load_into(model, layout.model(cell, "last"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def test_adversarial_training_crafts_each_batch_from_its_own_random_numbers(study_data, one):
    """One step of `at` written out, with the generator that is named after data and objective."""
    study, cell, layout = one("dense")
    trainer = Trainer(study, cell, layout, CPU)
    (stage,) = trainer.stages
    trainer.run.optimizer = torch.optim.SGD(trainer.run.model.parameters(), lr=stage.fit.lr)
    batch = torch.arange(16)
    found = trainer._step(stage, batch)
    model, splits = fresh(study, cell)
    generator = torch.Generator().manual_seed(derive_seed("craft", "digits", "at", 0))
    attacker = Attacker(study.threat.eps, study.training.crafting, generator)
    x, y = splits.train.x_NCHW[batch], splits.train.y_N[batch]
    adversarial = attacker.attack_labels(model.train(), x, y)
    assert found == pytest.approx(F.cross_entropy(model(adversarial), y).item())


def test_loss_that_is_not_finite_stops_with_stage_and_epoch(one):
    study, cell, layout = one("dense")
    trainer = Trainer(study, cell, layout, CPU)
    trainer.objective = lambda model, x, y, attacker: model(x).sum() * float("nan")
    (stage,) = trainer.stages
    trainer.run.optimizer = torch.optim.SGD(trainer.run.model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in trainer.run.model.named_parameters()}
    with pytest.raises(TrainingError, match="loss is nan in stage pretrain, epoch 1"):
        trainer._step(stage, torch.arange(8))
    for name, parameter in trainer.run.model.named_parameters():
        assert torch.equal(parameter, before[name])


# ---------------------------------------------------------------- methods that start from dense


@pytest.fixture
def pruned(study_data, one):
    """pruned(method) -> a trained cell whose dense start was trained before."""

    def train(method, **grid):
        study, cell, layout = one(method, **grid)
        for each in (starting_cell(cell), cell):
            training.train_cell(study, each, layout, device="cpu")
        return study, cell, layout

    return train


def load(study, cell, layout):
    model, _ = fresh(study, cell)
    weights.load_into(model, layout.model(cell, "last"))
    return model


def test_hydra_prune_stage_moves_scores_and_batch_norm_and_nothing_else(pruned):
    study, cell, layout = pruned("hydra")
    dense = load(study, starting_cell(cell), layout)
    trainer = Trainer(study, cell, layout, CPU)
    prune, run = trainer.stages[0], trainer.run
    with torch.no_grad():
        run.model[-1].bias.fill_(0.5)
    prune.before_fit(run)
    scores = {n: p.detach().clone() for n, p in run.model.named_parameters() if "score" in n}
    run.optimizer = torch.optim.SGD(prune.parameters(run.model), lr=0.5, weight_decay=0.1)
    first = [module.weight != 0 for module in prunable(run.model).values()]
    for i in range(10):
        trainer._step(prune, torch.arange(32 * i, 32 * (i + 1)))
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
    assert live_count(run.model) == sum(
        n - int(n * 0.9 + 1e-9) for n in (m.weight.numel() for m in prunable(run.model).values())
    )


def test_lwm_keeps_the_largest_weights_of_the_dense_network_and_trains_them(pruned):
    study, cell, layout = pruned("lwm")
    dense = prunable(load(study, starting_cell(cell), layout))
    for name, module in prunable(load(study, cell, layout)).items():
        before, after = dense[name].weight.detach(), module.weight.detach()
        keep = before.numel() - int(before.numel() * 0.9 + 1e-9)
        smallest = sorted(before.abs().flatten().tolist())[-keep]
        assert torch.equal(after != 0, before.abs() >= smallest)
        assert not torch.equal(after[after != 0], before[after != 0])


def test_admm_pulls_the_weights_towards_their_projection(pruned, study_data):
    study_data["methods"]["admm"] |= {"rho": 5.0}
    study_data["methods"]["admm"]["admm"] |= {"epochs": 3}
    study, cell, layout = pruned("admm")
    trainer = Trainer(study, cell, layout, CPU)
    stage, run = trainer.stages[0], trainer.run
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(stage.parameters(run.model), lr=0.02, momentum=0.9)

    def gap():
        return sum(
            float((module.weight.detach() - stage.Z[name]).square().sum())
            for name, module in prunable(run.model).items()
        )

    before = gap()
    for i in range(15):
        trainer._step(stage, torch.arange(32 * i, 32 * (i + 1)))
    assert gap() < 0.2 * before


@pytest.mark.parametrize("method", ["lwm", "hydra", "admm"])
def test_cost_counts_the_dense_start_too(method, pruned):
    study, cell, layout = pruned(method)
    own, start = (
        json.loads(layout.training(each).read_text()) for each in (cell, starting_cell(cell))
    )
    stages = len(study.methods[method].model_dump(include={"prune", "admm", "finetune", "retrain"}))
    assert start["cost"]["epochs"] == 1
    assert own["cost"]["epochs"] == 1 + stages
    assert [point["epoch"] for point in own["curve"]] == list(range(1, 2 + stages))
    assert own["curve"][:1] == start["curve"]
    batches = len(fresh(study, cell)[1].train) // study.training.batch_size
    passes = batches * (study.training.crafting.steps + 1)
    assert own["cost"]["forward_passes"] == passes * (1 + stages)
    assert own["cost"]["peak_live_weights"] == weight_count(load(study, cell, layout))


# ---------------------------------------------------------------- validation


def test_validation_is_repeatable_and_leaves_the_network_alone(one):
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
    model(splits.train.x_NCHW[:200])  # statistics differ from those of the validation batch
    attacker = Attacker(1e-9, study.training.crafting, torch.Generator())
    found = validate(model, part, attacker, 1)
    expected = float((model.eval()(part.x_NCHW).argmax(1) == part.y_N).float().mean())
    assert found["val_clean"] == found["val_robust"] == pytest.approx(expected)


def test_missing_start_is_one_line_that_says_what_to_train(one):
    study, cell, layout = one("lwm")
    with pytest.raises(UsageError, match=r"train --cell digits/small_cnn/dense/at/s0\.0000/seed0"):
        Trainer(study, cell, layout, CPU)
