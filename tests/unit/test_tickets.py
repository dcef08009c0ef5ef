"""TwinRep, Robust Bird and the robust scratch ticket on networks of two layers."""

import math

import pytest
import torch
from torch import nn

from robsparse.base.counts import keep_count
from robsparse.baselines import robust_bird, scratch_ticket, twinrep
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.training.stages import Run


def started(stage, sparsity=0.5, steps_per_epoch=2, model=None):
    torch.manual_seed(1)
    model = model or nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    run = Run(model, sparsity, torch.Generator().manual_seed(0))
    initial = {name: m.weight.detach().clone() for name, m in prunable(model).items()}
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(stage.parameters(model), lr=0.1, momentum=0.9)
    run.steps = stage.fit.epochs * steps_per_epoch
    return stage, run, initial


def step(stage, run):
    torch.manual_seed(run.step)
    run.optimizer.zero_grad()
    run.model(torch.randn(16, 6)).square().mean().backward()
    stage.before_step(run)
    run.optimizer.step()
    stage.after_step(run)
    run.step += 1


def largest_of_all(sizes, keep):
    """Names and flat positions of the largest values of several tensors."""
    every = [(v, n, i) for n, t in sizes.items() for i, v in enumerate(t.flatten().tolist())]
    return {(n, i) for _, n, i in sorted(every, key=lambda one: -one[0])[:keep]}


def live_positions(run):
    return {
        (name, i)
        for name, module in prunable(run.model).items()
        for i, value in enumerate(module.weight.flatten().tolist())
        if value != 0
    }


# ---------------------------------------------------------------- TwinRep


def twin(**params):
    train = {"epochs": 4, "lr": 0.1}
    return twinrep.TwinStage(twinrep.Params(train=train, prune_at=0.5, **params))


def test_twinrep_weights_are_products_and_both_factors_get_their_gradient():
    _, run, initial = started(twin())
    layer = run.model[0].parametrizations.weight
    factor = layer[0].factor
    assert factor.abs().max() <= 1 / math.sqrt(6)
    assert torch.equal(run.model[0].weight, initial["0"] * factor)
    upstream = torch.randn(5, 6)
    (run.model[0].weight * upstream).sum().backward()
    assert torch.allclose(factor.grad, upstream * initial["0"])
    assert torch.allclose(layer.original.grad, upstream * factor)


def test_twinrep_keeps_the_largest_products_of_the_whole_network_from_its_epoch_on():
    stage, run, _ = started(twin())
    for run.epoch in range(4):
        products = {name: m.weight.detach().abs() for name, m in prunable(run.model).items()}
        stage.before_epoch(run)
        total = weight_count(run.model)
        if run.epoch < 2:
            assert (stage.active_weights(run), stage.selectable) == (total, False)
        if run.epoch == 2:
            expected = largest_of_all(products, keep_count(total, 0.5))
        if run.epoch >= 2:
            assert live_positions(run) == expected
            assert (stage.active_weights(run), stage.selectable) == (len(expected), True)
        before = run.model[3].weight.detach().clone()
        step(stage, run)
        assert not torch.equal(before, run.model[3].weight)
    stage.finalize(run)
    assert live_positions(run) == expected
    assert not hasattr(run.model[0], "parametrizations")


def test_twinrep_also_prunes_a_run_of_one_epoch():
    stage = twinrep.TwinStage(twinrep.Params(train={"epochs": 1}))
    stage, run, _ = started(stage)
    stage.before_epoch(run)
    assert nonzero_count(run.model) == keep_count(weight_count(run.model), 0.5)


# ---------------------------------------------------------------- Robust Bird


def bird(**params):
    train = {"epochs": 40, "lr": 0.1, "milestones": [0.25, 0.75]}
    return robust_bird.BirdStage(robust_bird.Params(train=train, **params))


def test_robust_bird_draws_the_ticket_after_five_similar_masks_in_a_row():
    stage, run, _ = started(bird(distance=0.1))
    total = weight_count(run.model)
    weights = {name: m.parametrizations.weight.original for name, m in prunable(run.model).items()}
    for run.epoch in range(12):
        with torch.no_grad():
            for weight in weights.values():  # the masks of epochs 1 to 4 are all different
                if run.epoch < 5:
                    weight.copy_(torch.randn(weight.shape, generator=run.generator))
        step(stage, run)
        before = {name: weight.detach().abs() for name, weight in weights.items()}
        stage.before_epoch(run)
        if stage.selectable:
            break
        assert nonzero_count(run.model) == stage.active_weights(run) == total
    # The first of the equal masks is before epoch 5, the fifth is before epoch 9.
    assert 8 <= run.epoch <= 10
    assert stage.drawn_at == run.epoch
    assert live_positions(run) == largest_of_all(before, keep_count(total, 0.5))
    assert not run.optimizer.state  # the second phase has a new optimiser


def test_robust_bird_measures_the_share_of_entries_that_differ():
    stage = bird(distance=0.25)
    last = torch.tensor([1, 1, 0, 0], dtype=torch.bool)
    other = torch.tensor([1, 1, 1, 0], dtype=torch.bool)  # one of four entries differs
    far = torch.tensor([0, 1, 1, 0], dtype=torch.bool)
    for masks, expected in (
        ([other] * 4 + [last], True),
        ([far] + [last] * 4, False),
        ([last] * 4, False),  # four masks are not enough
    ):
        stage.masks = masks
        assert (len(masks) == robust_bird.COMPARED and stage.settled()) is expected


def test_robust_bird_draws_at_its_share_at_the_latest_and_restarts_the_schedule():
    stage, run, _ = started(bird(distance=0.0, latest=0.1))
    assert [stage.lr_factor(s, 2) for s in (0, 7)] == [1.0, 1.0]
    for run.epoch in range(5):
        step(stage, run)
        stage.before_epoch(run)
        assert stage.selectable == (run.epoch >= 4)
    # 36 epochs are left: the rate drops 9 and 27 epochs after the draw at epoch 4.
    factors = [stage.lr_factor(2 * epoch, 2) for epoch in (4, 12, 13, 30, 31, 39)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_robust_bird_may_leave_linear_layers_dense():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    stage, run, _ = started(bird(layers="conv", latest=0.03), model=model)
    run.epoch = 5
    stage.before_epoch(run)
    counts = [int(m.weight.count_nonzero()) for m in prunable(run.model).values()]
    assert counts == [18, 48]


# ---------------------------------------------------------------- robust scratch ticket


def popup(**params):
    return scratch_ticket.PopupStage(scratch_ticket.Params(train={"epochs": 4}, **params))


def test_scratch_ticket_learns_a_mask_and_changes_no_weights():
    stage, run, initial = started(popup())
    raw = {
        n: m.parametrizations.weight.original.detach().clone()
        for n, m in prunable(run.model).items()
    }
    for name, weight in initial.items():
        size = math.sqrt(2 / weight.shape[1])
        assert torch.equal(raw[name], torch.where(weight < 0, -size, size))
    norm = run.model[1].weight.detach().clone()
    used = []
    for _ in range(30):
        used.append(live_positions(run))
        scores = {
            n: m.parametrizations.weight[0].score.detach().abs()
            for n, m in prunable(run.model).items()
        }
        for name, score in scores.items():
            expected = largest_of_all({name: score}, score.numel() - score.numel() // 2)
            assert {one for one in used[-1] if one[0] == name} == expected
        step(stage, run)
    assert used[0] != used[-1]
    for name, module in prunable(run.model).items():
        assert torch.equal(module.parametrizations.weight.original, raw[name])
    assert torch.equal(run.model[1].weight, norm)
    assert stage.active_weights(run) == weight_count(run.model)


def test_scratch_ticket_has_a_straight_through_gradient_for_every_score():
    _, run, _ = started(popup(weights="initial"))
    layer = run.model[0].parametrizations.weight
    upstream = torch.randn(5, 6)
    (run.model[0].weight * upstream).sum().backward()
    score = layer[0].score
    assert torch.allclose(score.grad, upstream * layer.original * score.sign())


def test_scratch_ticket_may_train_batch_norm():
    stage, run, _ = started(popup(batch_norm="trained"))
    before = run.model[1].weight.detach().clone()
    for _ in range(3):
        step(stage, run)
    assert not torch.equal(run.model[1].weight, before)
