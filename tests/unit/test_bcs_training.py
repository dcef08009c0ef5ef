"""BCS through its real hooks and the one training loop: budget, signs, zeros, decay."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.counts import keep_count
from robsparse.method import bcs
from robsparse.method.bcs import (
    Params,
    SamplingStage,
    active_masks,
    authors_counts,
    initial_counts,
    stages,
    thetas,
)
from robsparse.method.bcs import (
    signed_layers as bcs_layers,
)
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.sparsity.masks import bake, plain_state
from robsparse.sparsity.rewiring import DeviceRewiring, HostRewiring
from robsparse.study.cells import Cell, Layout
from robsparse.training import loop
from robsparse.training.session import prepare_session
from robsparse.training.stages import Run

CPU = torch.device("cpu")


def chain(*widths):
    """Linear layers with ReLU between them."""
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def begin(model, sparsity, *, seed=0, lr=0.1, sgd=None, **params):
    """Return a stage and its run before the first step."""
    stage = SamplingStage(Params(**params))
    run = Run(model, sparsity, torch.Generator().manual_seed(seed), lr=lr)
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(
        stage.parameters(model), lr=lr, **({"momentum": 0.9} | (sgd or {}))
    )
    return stage, run


def one_theta(values, *, sparsity, sgd=None, sign=None, **params):
    """A single linear layer with the given theta."""
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    stage, run = begin(model, sparsity, sgd=sgd or {}, **params)
    (theta,) = thetas(model)
    theta.data.copy_(torch.tensor([values]))
    if sign is not None:
        model[0].parametrizations.weight[0].sign.copy_(torch.tensor([sign]))
    return model, stage, run, theta


def last_step(run):
    """Return the numbers of pruned and regrown connections of the last step."""
    log = run.connections.steps().to_pandas()
    return log[log.step == log.step.max()][["pruned", "regrown"]].sum().to_dict()


def fits(observed, expected=None):
    """Chi-square test of counts against expected counts. By default, these are all equal."""
    p_value = stats.chisquare(observed, expected).pvalue
    print(f"chi-square over {len(observed)} counts: p = {p_value:.2f}")
    assert p_value > 0.01


def counts_at_start(model, sparsity, init):
    return initial_counts(Run(model, sparsity, torch.Generator().manual_seed(0)), init)


def no_gradient(model, *_):
    """An objective with gradients of 0."""
    return 0 * sum(p.sum() for p in model.parameters())


def take_step(made, stage, n, factor=1.0):
    """One step of a session on the first n training images."""
    loop.set_learning_rate(made.run, stage, factor)
    batch = made.batches.train[:n]
    loop.compute_gradients(made.run, stage, made.objective, made.attacker, batch)
    loop.update(made.run, stage)


def sgd_step(stage, run, loss):
    run.optimizer.zero_grad()
    loss.backward()
    stage.before_step(run)
    run.optimizer.step()
    stage.after_step(run)


# ---------------------------------------------------------------- one step by hand


def test_full_step_by_hand_with_signs_momentum_and_one_possible_regrowth():
    # w = (-0.5, 0.2, 0, -0.1), x = (1, 2, 3, 4), loss = w.x: dL/dw = x
    # dL/dtheta = (-1, 2, 0, -4); theta - 0.1 * g = (0.6, 0.0, 0, 0.5) with exact thirds avoided
    model, stage, run, theta = one_theta(
        [0.5, 0.2, 0.0, 0.1], sparsity=0.25, sign=[-1.0, 1.0, 1.0, -1.0], noise_scale=0.0
    )
    # The budget is 3 of 4 and theta[1] falls to 0, so two positions are dormant and one is drawn.
    sgd_step(stage, run, model(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum())
    after = theta.detach()[0].tolist()
    assert after[0] == pytest.approx(0.6)
    assert after[3] == pytest.approx(0.5)
    assert sorted(after[1:3]) == pytest.approx([0.0, 1e-12], abs=1e-15)
    assert max(after[1:3]) == pytest.approx(1e-12)
    assert last_step(run) == {"pruned": 1, "regrown": 1}
    assert model[0].weight.detach()[0, 0].item() == pytest.approx(-0.6)
    assert run.optimizer.state[theta]["momentum_buffer"][0].tolist() == [-1.0, 2.0, 0.0, -4.0]


@pytest.mark.parametrize(("momentum", "expected"), [("keep", 5.0), ("reset", 0.0)])
def test_pruned_and_redrawn_weight_keeps_or_loses_its_velocity(momentum, expected):
    # The budget is all three positions, so the position that becomes dormant is drawn again.
    model, stage, run, theta = one_theta(
        [0.5, 0.2, 0.3], sparsity=0.0, momentum=momentum, noise_scale=0.0, sign=[1.0, 1.0, 1.0]
    )
    sgd_step(stage, run, model(torch.tensor([[1.0, 5.0, 2.0]])).sum())
    assert theta.detach()[0].tolist() == pytest.approx([0.4, 1e-12, 0.1])
    velocity = run.optimizer.state[theta]["momentum_buffer"][0].tolist()
    assert velocity == [1.0, expected, 2.0]  # only the velocity of the regrown weight changes


def test_reset_works_without_momentum():
    model, stage, run, _ = one_theta(
        [0.5, 0.2], sparsity=0.0, momentum="reset", sgd={"momentum": 0.0}, noise_scale=0.0
    )
    sgd_step(stage, run, model(torch.tensor([[9.0, 9.0]])).abs().sum() * 100)
    assert nonzero_count(model) == 2


def test_regrown_weights_get_the_value_of_the_parameter():
    model, stage, run, theta = one_theta([0.5, 0.0], sparsity=0.0, regrown_theta=0.25)
    sgd_step(stage, run, model(torch.zeros(1, 2)).sum())
    assert theta.detach()[0].tolist() == pytest.approx([0.5, 0.25], abs=1e-5)


@pytest.mark.parametrize(("waking", "drifts"), [("drawn", False), ("drift", True)])
def test_dormant_theta_drifts_over_zero_on_its_momentum_only_if_allowed(waking, drifts):
    stage = SamplingStage(Params(init="authors", waking=waking, noise_scale=0.0))
    model = chain(2, 1, 1)  # two layers, because the authors' shares need a first and a last layer
    run = Run(model, 0.4, torch.Generator().manual_seed(0), lr=0.1)
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    first, second = thetas(model)
    first.data.copy_(torch.tensor([[1.0, -0.05]]))  # two of three are active; the budget is one
    second.data.copy_(torch.tensor([[1.0]]))
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    run.optimizer.state[first]["momentum_buffer"] = torch.tensor([[0.0, -1.0]])
    stage.before_step(run)
    run.optimizer.step()  # velocity -0.9 moves the dormant theta to -0.05 + 0.09
    stage.after_step(run)
    assert (first[0, 1].item() > 0) is drifts
    assert nonzero_count(model) == 2 + drifts


def test_rewiring_draws_nothing_when_nothing_is_missing():
    _, stage, run, _ = one_theta([0.5, 0.4, 0.0, 0.0], sparsity=0.5, noise_scale=0.0)
    state = run.generator.get_state()
    stage.before_step(run)
    stage.after_step(run)
    assert last_step(run) == {"pruned": 0, "regrown": 0}
    assert torch.equal(run.generator.get_state(), state)


# ---------------------------------------------------------------- the start


def test_initial_counts_of_the_authors_by_hand():
    model = chain(7, 5, 30, 11)  # sizes 35, 150, 330
    assert counts_at_start(model, 0.9, "authors") == {
        "0": int(0.6 * 35),
        "2": int(0.05 * 150),
        "4": int(0.6 * 330),
    }
    assert counts_at_start(model, 0.9, "authors") == {"0": 21, "2": 7, "4": 198}


@pytest.mark.parametrize("init", ["strict", "authors", "erk", "uniform"])
def test_start_keeps_weights_at_random_positions_and_all_signs(init):
    model = chain(20, 30, 10)
    before = {name: module.weight.detach().clone() for name, module in prunable(model).items()}
    counts = counts_at_start(model, 0.8, init)
    begin(model, 0.8, init=init)
    for name, module in prunable(model).items():
        weight, sign = module.weight.detach(), module.parametrizations.weight[0].sign
        assert int((weight != 0).sum()) == counts[name]
        assert torch.equal(weight[weight != 0], before[name][weight != 0])
        assert torch.equal(sign, before[name].sign())  # dormant positions too
        theta = module.parametrizations.weight.original.detach()
        assert torch.equal(theta, theta.clamp(min=0))


def test_start_is_uniform_over_positions():
    counts = np.zeros(20)
    for seed in range(600):
        model = nn.Sequential(nn.Linear(20, 1, bias=False))
        begin(model, 0.7, seed=seed)
        counts += (model[0].weight.detach()[0] != 0).numpy()
    assert counts.sum() == 600 * 6
    fits(counts)


def test_another_generator_seed_starts_from_other_positions():
    one, two = chain(20, 10), chain(20, 10)
    begin(one, 0.8, seed=0)
    begin(two, 0.8, seed=1)
    assert not torch.equal(one[0].weight != 0, two[0].weight != 0)


def test_initial_counts_of_the_authors_are_the_published_ones():
    """Every row of the table, with the layer sizes of the published architectures."""
    table = pd.read_csv(Path(__file__).with_name("authors_counts.csv"))
    for (arch, classes), rows in table.groupby(["arch", "num_classes"]):
        with torch.device("meta"):
            params = registry.entry("arch", arch).params()
            model = models.build(arch, params, (3, 32, 32), int(classes))
        sizes = {name: module.weight.numel() for name, module in prunable(model).items()}
        for row in rows.itertuples():
            found = authors_counts(sizes, arch, round(1 - row.connectivity, 4))
            assert sum(found.values()) == row.authors_initial_count, (arch, row.connectivity)


@pytest.mark.parametrize("init", ["strict", "erk", "uniform"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.995])
def test_all_inits_but_authors_start_at_exactly_the_budget(init, sparsity):
    for arch in (
        "vgg16",
        "resnet18",
        "wrn28_2",
        "small_resnet",
    ):  # vgg16 at 0.995: `authors` exceeds it
        with torch.device("meta"):
            model = models.build(arch, registry.entry("arch", arch).params(), (3, 32, 32), 10)
        run = Run(model, sparsity, torch.Generator().manual_seed(0), arch=arch)
        counts = initial_counts(run, init)
        assert sum(counts.values()) == keep_count(weight_count(model), sparsity)
        for name, module in prunable(model).items():
            assert 0 <= counts[name] <= module.weight.numel()


def test_strict_start_changes_the_authors_layers_at_random_to_meet_the_budget():
    model = chain(30, 40, 40, 40, 10)  # sizes 1200, 1600, 1600, 400
    theirs = counts_at_start(model, 0.5, "authors")
    more = counts_at_start(model, 0.5, "strict")
    assert sum(theirs.values()) < keep_count(weight_count(model), 0.5)
    assert all(more[name] >= theirs[name] for name in theirs)
    theirs, fewer = (counts_at_start(model, 0.95, init) for init in ("authors", "strict"))
    kept = keep_count(weight_count(model), 0.95) / sum(theirs.values())
    assert kept < 0.5
    for name, count in theirs.items():
        assert fewer[name] == pytest.approx(kept * count, abs=4 * (kept * count) ** 0.5)


# ---------------------------------------------------------------- switches


def test_temperature_is_langevin_noise():
    model = nn.Sequential(nn.Linear(200, 100, bias=False))
    stage, run = begin(model, 0.5, lr=0.2, temperature=0.03)
    (theta,) = thetas(model)
    theta.data = torch.where(theta > 0, 9.0, 0.0)
    stage.before_step(run)
    stage.after_step(run)
    noise = (theta.detach() - 9)[theta > 5] / math.sqrt(2 * 0.2 * 0.03)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("rewiring", ["never", "until_last_drop"])
def test_after_rewiring_the_active_set_is_fixed_and_its_weights_may_change_sign(rewiring):
    model = chain(6, 20, 6)
    stage, run = begin(model, 0.5, rewiring=rewiring, noise_scale=0.0)
    budget, x = nonzero_count(model), torch.rand(16, 6)
    run.steps = 4  # drops at steps 2 and 3
    for run.step in range(3):
        sgd_step(stage, run, (model(x) - x).square().mean())
    fixed = rewiring == "never"
    assert [layer.fixed for layer in bcs_layers(model)] == [fixed, fixed]
    run.step = 3
    sgd_step(stage, run, (model(x) - x).square().mean())
    before = [module.weight.detach().clone() for module in prunable(model).values()]
    for _ in range(60):
        sgd_step(stage, run, 20 * (model(x) + x).square().mean())
        assert last_step(run) == {"pruned": 0, "regrown": 0}
    after = [module.weight.detach() for module in prunable(model).values()]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old != 0, new != 0)
    assert nonzero_count(model) == budget
    assert any((old * new < 0).any() for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("milestones", [(0.5, 0.75), (0.3, 0.9), (0.0,)])
def test_rewiring_goes_on_until_the_last_drop_of_the_schedule_whatever_the_warm_up(  # noqa: PLR0917
    milestones, warmup, gamma, study_data, load_study, tmp_path, monkeypatch
):
    study_data["grid"] |= {"methods": ["bcs"], "objectives": ["natural"]}
    study_data["training"]["batch_size"] = 300
    fit = {"epochs": 4, "milestones": milestones, "warmup": warmup, "gamma": gamma}
    study_data["methods"]["bcs"] = {"rewiring": "until_last_drop", "train": fit}
    study, fixed, ordinary = load_study(study_data), [], SamplingStage.after_step

    def after_step(self, run):
        ordinary(self, run)
        fixed.append(self.fixed)

    monkeypatch.setattr(SamplingStage, "after_step", after_step)
    loop.train_cell(study, study.cells()[0], Layout(tmp_path), device="cpu")
    steps = len(fixed)
    assert steps >= 8
    assert fixed == [step >= max(milestones) * steps for step in range(steps)]


def test_a_fixed_active_set_survives_a_checkpoint():
    one, two = chain(6, 20, 6), chain(6, 20, 6)
    stage, run = begin(one, 0.5, rewiring="never")
    sgd_step(stage, run, one(torch.rand(8, 6)).square().mean())
    begin(two, 0.5, seed=9, rewiring="never")
    two.load_state_dict(one.state_dict())
    assert all(layer.fixed for layer in bcs_layers(two))
    for name, module in prunable(two).items():
        assert torch.equal(module.weight, prunable(one)[name].weight)


@pytest.mark.parametrize("pattern", [None, "1:4"])
@pytest.mark.parametrize("kind", [HostRewiring, DeviceRewiring])
def test_a_checkpoint_of_gathered_theta_continues_with_the_same_bits_and_is_no_larger(
    kind, pattern, tmp_path, monkeypatch
):
    monkeypatch.setattr(bcs, "make_rewiring", kind)
    x = torch.rand(16, 60)

    def ready():
        torch.manual_seed(0)
        model = chain(60, 200, 60)
        return model, *begin(model, 0.9, noise_scale=1.0, pattern=pattern)

    def train(model, stage, run, steps):
        for _ in range(steps):
            sgd_step(stage, run, (model(x) - x).square().mean())

    model, stage, run = ready()
    size = {}
    for moment in ("before", "after"):
        torch.save(model.state_dict(), tmp_path / moment)
        size[moment] = (tmp_path / moment).stat().st_size
        train(model, stage, run, 10)
    assert size["after"] < size["before"] + 2000
    kept = {"model": model.state_dict(), "optimizer": run.optimizer.state_dict()}
    kept |= {"stage": stage.state(), "generator": run.generator.get_state()}
    torch.save(kept, tmp_path / "state")
    train(model, stage, run, 10)

    kept = torch.load(tmp_path / "state", weights_only=True)
    again, stage, run = ready()
    again.load_state_dict(kept["model"])
    run.optimizer.load_state_dict(kept["optimizer"])
    stage.load_state(kept["stage"])
    run.generator.set_state(kept["generator"])
    train(again, stage, run, 10)
    for one, two in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


# ---------------------------------------------------------------- real steps on tiny data


@st.composite
def cases(draw):
    widths = draw(st.lists(st.integers(1, 9), min_size=3, max_size=5))
    return {
        "widths": widths,
        "sparsity": draw(st.integers(0, 99)) / 100,
        "seed": draw(st.integers(0, 10_000)),
        "lr": draw(st.sampled_from([0.01, 0.5, 5.0])),
        "sgd": {
            "momentum": draw(st.sampled_from([0.0, 0.9])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        },
        "params": {
            "init": draw(st.sampled_from(["strict", "erk", "uniform"])),
            "regrowth": draw(st.sampled_from(["size", "dormant"])),
            "momentum": draw(st.sampled_from(["keep", "reset"])),
            "noise_scale": draw(st.sampled_from([0.0, 1e-6, 1.0])),
        },
    }


@given(cases())
def test_budget_signs_and_zeros_hold_at_every_step_of_real_training(case):
    torch.manual_seed(case["seed"])
    model = chain(*case["widths"])
    stage, run = begin(
        model,
        case["sparsity"],
        seed=case["seed"],
        lr=case["lr"],
        sgd=case["sgd"],
        **case["params"],
    )
    budget = keep_count(weight_count(model), case["sparsity"])
    signs = [module.parametrizations.weight[0].sign.clone() for module in prunable(model).values()]
    assert nonzero_count(model) == budget
    x, y = torch.rand(8, case["widths"][0]), torch.rand(8, case["widths"][-1])
    for _ in range(6):
        loss = (model(x) - y).square().mean().clamp(max=1e6)
        run.optimizer.zero_grad()
        loss.backward()
        stage.before_step(run)
        before = [theta > 0 for theta in thetas(model)]
        run.optimizer.step()
        stage.after_step(run)
        assert nonzero_count(model) == budget
        assert last_step(run)["regrown"] == last_step(run)["pruned"]
        state = plain_state(model)
        for name, sign, theta, was in zip(
            prunable(model), signs, thetas(model), before, strict=True
        ):
            weight = state[f"{name}.weight"]
            assert not weight[theta <= 0].any()
            assert torch.equal(weight[theta > 0].sign(), sign[theta > 0])
            woke = (theta > 0) & ~was
            assert torch.all(theta[woke] == torch.tensor(stage.params.regrown_theta))


@given(st.integers(0, 1000), st.sampled_from([0.5, 0.9, 0.99]))
def test_authors_variant_is_filled_and_never_pruned(seed, sparsity):
    torch.manual_seed(seed)
    model = chain(6, 20, 20, 6)
    stage, run = begin(model, sparsity, seed=seed, init="authors")
    budget = keep_count(weight_count(model), sparsity)
    count = nonzero_count(model)
    x = torch.rand(8, 6)
    for _ in range(6):
        sgd_step(stage, run, (model(x) - x).square().mean())
        left = count - last_step(run)["pruned"]
        assert nonzero_count(model) >= max(left, budget)
        if last_step(run)["regrown"]:
            assert nonzero_count(model) == budget
        count = nonzero_count(model)


@pytest.mark.parametrize(("seed", "lr", "scale"), [(0, 0.1, 0.01), (1, 0.02, 0.5)])
def test_noise_has_mean_zero_and_standard_deviation_lr_times_scale(seed, lr, scale):
    model = nn.Sequential(nn.Linear(200, 100, bias=False))
    stage, run = begin(model, 0.5, seed=seed, lr=lr, noise_scale=scale)
    (theta,) = thetas(model)
    theta.data = torch.where(theta > 0, 1.0, 0.0)
    stage.before_step(run)
    stage.after_step(run)
    noise = (theta.detach() - 1)[theta > 0] / (lr * scale)
    assert len(noise) == 10_000
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01
    assert not theta.detach()[theta <= 0].any()


def test_baked_network_computes_the_same_with_exact_zeros():
    model = chain(6, 9, 4)
    stage, run = begin(model, 0.7)
    x = torch.rand(8, 6)
    for _ in range(3):
        sgd_step(stage, run, model(x).square().mean())
    output, nonzero = model(x), nonzero_count(model)
    stage.finalize(run)
    assert torch.equal(model(x), output)
    assert nonzero_count(model) == nonzero == keep_count(weight_count(model), 0.7)
    assert "0.weight" in dict(model.named_parameters())
    bake(model)  # no parametrisation is left


def test_one_stage_from_scratch():
    (stage,) = stages(Params())
    assert stage.name == "train"
    assert stage.selectable


# ---------------------------------------------------------------- through the loop


@pytest.fixture
def prepared(study_data, load_study, tmp_path):
    """prepared(**changes of bcs.train) -> a session and its prepared first stage."""

    def make(**fit):
        study_data["methods"]["bcs"]["train"] |= fit
        study_data["methods"]["bcs"]["noise_scale"] = 0.0
        cell = Cell("digits", "small_cnn", "bcs", "at", 0.9, 0)
        made = prepare_session(load_study(study_data), cell, Layout(tmp_path / "run"), CPU)
        stage = made.stages[0]
        stage.before_fit(made.run)
        made.run.optimizer = torch.optim.SGD(stage.parameters(made.run.model), lr=stage.fit.lr)
        return made, stage

    return make


@pytest.mark.parametrize("lr_factor", [1.0, 0.1])
def test_sgdw_shrinks_every_trained_tensor_by_weight_decay_times_the_factor(
    prepared, lr_factor, monkeypatch
):
    made, stage = prepared(lr=0.02, weight_decay=0.25, decay="sgdw")
    run = made.run
    with torch.no_grad():
        run.model.get_parameter("1.bias").fill_(3.0)
    before = [p.detach().clone() for p in run.model.parameters()]
    # The loss has no gradient, so only the decay acts. It is not multiplied by lr.
    made = replace(made, objective=no_gradient)
    take_step(made, stage, 8, lr_factor)
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert torch.allclose(new, old * (1 - 0.25 * lr_factor))
    assert run.model.get_parameter("1.bias").tolist() == pytest.approx(
        [3 * (1 - 0.25 * lr_factor)] * 4
    )


def test_coupled_decay_is_multiplied_by_the_learning_rate(prepared):
    made, stage = prepared(lr=0.02, weight_decay=0.25, decay="coupled")
    made = replace(made, objective=no_gradient)
    run = made.run
    run.optimizer = torch.optim.SGD(
        stage.parameters(run.model), lr=0.02, weight_decay=stage.fit.weight_decay
    )
    before = [p.detach().clone() for p in run.model.parameters()]
    take_step(made, stage, 8)
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert torch.allclose(new, old * (1 - 0.02 * 0.25))


@pytest.mark.parametrize("objective", ["natural", "at", "mat", "trades", "mart"])
def test_step_gives_active_theta_of_every_layer_a_gradient(
    objective, study_data, load_study, tmp_path
):
    study_data["grid"] |= {"objectives": [objective], "sparsities": [0.5]}
    cell = Cell("digits", "small_cnn", "bcs", objective, 0.5, 0)
    made = prepare_session(load_study(study_data), cell, Layout(tmp_path / "run"), CPU)
    (stage,) = made.stages
    stage.before_fit(made.run)
    made.run.optimizer = torch.optim.SGD(stage.parameters(made.run.model), lr=0.0)
    active = active_masks(made.run.model)
    take_step(made, stage, 32)
    for theta, own in zip(thetas(made.run.model), active, strict=True):
        assert theta.grad[own].abs().sum() > 0
        assert not theta.grad[~own].any()


def test_peak_active_weights_include_an_authors_start_above_the_budget(
    study_data, load_study, tmp_path
):
    study_data["grid"] |= {"methods": ["bcs"], "sparsities": [0.95], "objectives": ["natural"]}
    study_data["methods"]["bcs"] |= {"init": "authors"}
    study_data["methods"]["bcs"]["train"] |= {
        "lr": 0.5
    }  # so that many are pruned in the only epoch
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    run = prepare_session(study, cell, layout, CPU).run
    started_with = sum(initial_counts(run, "authors").values())
    assert started_with > keep_count(weight_count(run.model), 0.95)
    loop.train_cell(study, cell, layout, device="cpu")
    record = json.loads(layout.training(cell).read_text())
    assert record["curve"][-1]["active_weights"] < started_with  # otherwise the test shows nothing
    assert record["cost"]["peak_active_weights"] == started_with
