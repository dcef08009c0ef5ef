"""HYDRA on small networks, by hand."""

import pytest
import torch
from torch import nn

from robsparse.baselines import hydra
from robsparse.schema.training import Fit
from robsparse.sparsity.layers import nonzero_count, prunable
from robsparse.sparsity.masks import magnitude_masks, plain_state
from robsparse.training.stages import FixedMaskStage, Run


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -1.0], [2.0, -3.0]]))
        model[3].weight.copy_(torch.tensor([[1.0, -2.0]]))
    return model


def pruning(model, sparsity=0.5):
    stage = hydra.PruneStage(hydra.Params().prune)
    run = Run(model=model, sparsity=sparsity, generator=torch.Generator())
    stage.before_fit(run)
    return stage, run


def test_scores_start_at_scaled_weights_and_the_first_mask_is_that_of_lwm():
    model = two_layers()
    masks = magnitude_masks(model, 0.5)
    pruning(model)
    score = model[0].parametrizations.weight[0].score
    # sqrt(6 / 2) * w / 4
    expected = 3**0.5 * torch.tensor([[1.0, -0.25], [0.5, -0.75]])
    torch.testing.assert_close(score.detach(), expected)
    assert model[0].weight.tolist() == [[4.0, 0.0], [0.0, -3.0]]
    for name, module in prunable(model).items():
        assert torch.equal(module.weight != 0, masks[name])


def test_score_gradient_is_that_of_the_weight_times_weight_and_sign_also_where_masked():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -1.0], [2.0, -3.0]]))
    pruning(model)
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    # dL/dw = x for both rows; d|score| gets dL/dw * w; the sign of the score is that of w.
    assert model[0].parametrizations.weight[0].score.grad.tolist() == [[4.0, 2.0], [2.0, 6.0]]


def test_two_layer_score_gradient_by_hand():
    """y = v * relu(W x) with the masked weights in the chain of the first layer."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -1.0], [2.0, 3.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
    pruning(model)  # keeps 4 and 3; keeps -2
    model(torch.tensor([[1.0, 1.0]])).sum().backward()
    # hidden = (4, 3); v masked = (0, -2): dL/dhidden = (0, -2); dL/dW = [[0, 0], [-2, -2]]
    first, second = (model[i].parametrizations.weight[0].score.grad for i in (0, 2))
    assert first.tolist() == [[0.0, 0.0], [-4.0, -6.0]]
    # dL/dv = hidden = (4, 3), times v = (1, -2), times sign(score)
    assert second.tolist() == [[4.0, 6.0]]


def test_pruning_trains_scores_and_batch_norm_and_freezes_weights_and_biases():
    model = two_layers()
    stage, _ = pruning(model)
    trained = {id(p) for p in stage.parameters(model)}
    names = {name for name, p in model.named_parameters() if id(p) in trained}
    assert names == {
        "0.parametrizations.weight.0.score",
        "1.weight",
        "1.bias",
        "3.parametrizations.weight.0.score",
    }


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_every_layer_keeps_its_exact_share_for_any_scores(sparsity):
    model = nn.Sequential(nn.Linear(30, 17), nn.ReLU(), nn.Linear(17, 10))
    stage, run = pruning(model, sparsity)
    for module in prunable(model).values():
        module.parametrizations.weight[0].score.data.normal_()
    stage.finalize(run)
    for module in prunable(model).values():
        n = module.weight.numel()
        assert int(module.weight.count_nonzero()) == n - int(n * sparsity + 1e-9)


def test_finetuning_keeps_the_mask_that_the_scores_chose():
    model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    stage, run = pruning(model, 0.8)
    for module in prunable(model).values():
        module.parametrizations.weight[0].score.data.normal_()
    stage.finalize(run)
    masks = {name: module.weight.detach() != 0 for name, module in prunable(model).items()}
    finetune = FixedMaskStage("finetune", Fit(epochs=1, lr=0.1))
    finetune.before_fit(run)
    optimizer = torch.optim.SGD(finetune.parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    state = plain_state(model)
    assert all(torch.equal(state[f"{name}.weight"] != 0, mask) for name, mask in masks.items())


def test_active_weights_in_pruning_are_all_weights():
    model = two_layers()
    stage, run = pruning(model)
    assert stage.active_weights(run) == 6
    assert nonzero_count(model) == 3
