"""The learning-rate schedules and the defaults of a stage."""

import pytest
import torch
from torch import nn

from robsparse.schema.training import Fit
from robsparse.sparsity.layers import nonzero_count
from robsparse.training.stages import (
    FixedMaskStage,
    Stage,
    begin_stage,
    remaining_weights,
    schedule_factor,
)


def factors(steps_per_epoch=1, **settings):
    fit = Fit(lr=0.3, **settings)
    return [schedule_factor(fit, s, steps_per_epoch) for s in range(fit.epochs * steps_per_epoch)]


def test_constant_schedule_is_always_one():
    assert factors(epochs=3, schedule="constant") == [1.0, 1.0, 1.0]


def test_cosine_by_hand():
    # cos(0), cos(45), cos(90), cos(135 degrees)
    root = 2**-0.5
    expected = [1.0, (1 + root) / 2, 0.5, (1 - root) / 2]
    assert factors(epochs=4, schedule="cosine") == pytest.approx(expected)


def test_cosine_counts_steps_and_not_epochs():
    fine = factors(steps_per_epoch=5, epochs=2, schedule="cosine")
    assert fine == pytest.approx(factors(epochs=10, schedule="cosine"))
    assert fine == sorted(fine, reverse=True)
    assert len(set(fine)) == 10


def test_step_drops_at_the_milestones_exactly():
    # the authors of BCS: times 0.1 from epoch 100 and from epoch 150 of 200
    found = factors(epochs=200, schedule="step")
    assert found[:100] == [1.0] * 100
    assert found[100:150] == pytest.approx([0.1] * 50)
    assert found[150:] == pytest.approx([0.01] * 50)


def test_step_schedule_has_gamma_and_any_number_of_milestones():
    found = factors(epochs=10, schedule="step", gamma=0.5, milestones=(0.2, 0.7, 0.9))
    assert found == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert factors(epochs=2, schedule="step", milestones=()) == [1, 1]
    assert factors(epochs=2, schedule="step", milestones=(0.0,)) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("tenth", range(1, 10))
def test_step_at_a_milestone_has_the_lower_rate(tenth):
    found = factors(steps_per_epoch=3, epochs=10, schedule="step", milestones=(tenth / 10,))
    assert found == pytest.approx([1.0] * (3 * tenth) + [0.1] * (30 - 3 * tenth))


def test_admm_retraining_drops_at_epochs_80_and_150_of_200():
    from robsparse.baselines.admm import Retrain  # noqa: PLC0415 (only one test needs it)

    found = [schedule_factor(Retrain(), epoch, 1) for epoch in (79, 80, 149, 150, 199)]
    assert found == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_stage_uses_the_schedule_of_its_fit():
    fit = Fit(epochs=4, lr=0.3)
    assert Stage(fit).lr_factor(3, 2) == schedule_factor(fit, 3, 2)


def test_parameters_that_a_stage_does_not_train_have_no_gradients(make_run):
    class OfTheBias(Stage):
        def parameters(self, model):
            return [model.bias]

    model = nn.Linear(3, 2)
    run, x = make_run(model, 0.5), torch.ones(4, 3)
    model(x).sum().backward()  # as an earlier stage leaves it
    begin_stage(run, OfTheBias(Fit(epochs=1, lr=0.1)), 1)
    model(x).sum().backward()
    assert model.weight.grad is None
    assert model.bias.grad.tolist() == [4.0, 4.0]
    begin_stage(run, Stage(Fit(epochs=1, lr=0.1)), 1)
    model(x).sum().backward()
    assert model.weight.grad.tolist() == [[4.0] * 3] * 2


def test_defaults_train_everything_and_add_nothing(make_run):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    stage, run = Stage(Fit(epochs=1, lr=0.1)), make_run(model, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for hook in ("before_fit", "before_epoch", "before_step", "after_step", "finalize"):
        getattr(stage, hook)(run)
    assert [id(p) for p in stage.parameters(model)] == [id(p) for p in model.parameters()]
    assert stage.penalty(run) is None
    assert stage.active_weights(run) == 6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    stage.load_state(stage.state())


def test_fixed_mask_is_drawn_once_and_survives_large_changes(make_run):
    model = nn.Sequential(nn.Linear(10, 4, bias=False))
    stage, run = FixedMaskStage("finetune", Fit(epochs=1, lr=0.1)), make_run(model, 0.75)
    stage.before_fit(run)
    mask = model[0].weight.detach() != 0
    assert stage.name == "finetune"
    assert int(mask.sum()) == 10
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.rand(4, 10) + 1)
    assert torch.equal(model[0].weight != 0, mask)
    stage.finalize(run)
    assert torch.equal(model[0].weight != 0, mask)
    assert nonzero_count(model) == stage.active_weights(run) == 10


def test_fixed_mask_of_a_pruned_network_is_unchanged(make_run):
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    mask = torch.rand(10, 10).argsort(dim=1) < 1  # one of ten in every row
    with torch.no_grad():
        model[0].weight.mul_(mask)
    FixedMaskStage("finetune", Fit(epochs=1, lr=0.1)).before_fit(make_run(model, 0.9))
    assert torch.equal(model[0].parametrizations.weight[0].mask, mask)


# ---------------------------------------------------------------- warm-up and cosine by epoch


def test_cosine_of_epochs_by_hand_uses_the_previous_epoch():
    # (1 + cos(pi (e - 1) / 4)) / 2 for e = 0, 1, 2, 3, the same in both steps of an epoch
    root = 2**-0.5
    by_epoch = [(1 + root) / 2, 1.0, (1 + root) / 2, 0.5]
    found = factors(steps_per_epoch=2, epochs=4, schedule="cosine_epochs")
    assert found == pytest.approx([factor for factor in by_epoch for _ in range(2)])


def test_warm_up_rises_by_equal_steps_to_the_schedule():
    found = factors(steps_per_epoch=2, epochs=4, schedule="constant", warmup=2)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_warm_up_multiplies_the_schedule():
    plain = factors(steps_per_epoch=3, epochs=4, schedule="cosine")
    found = factors(steps_per_epoch=3, epochs=4, schedule="cosine", warmup=1)
    assert found == pytest.approx([p * min(1, (t + 1) / 3) for t, p in enumerate(plain)])


def test_remaining_weights_are_the_nonzero_weights(make_run):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, -1.0], [2.0, 0.0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 0.5]]))
    masks = remaining_weights(make_run(model, 0.5))
    assert masks["0"].tolist() == [[False, True], [True, False]]
    assert masks["1"].tolist() == [[False, True]]
    assert not masks["0"].requires_grad


def test_fixed_mask_keeps_the_largest_weights_by_default(make_run):
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, -3.0, 0.2, 2.0]]))
    stage = FixedMaskStage("finetune", Fit(epochs=1, lr=0.1))
    stage.before_fit(make_run(model, 0.5))
    assert stage.name == "finetune"
    assert model[0].weight.tolist() == [[0.0, -3.0, 0.0, 2.0]]
