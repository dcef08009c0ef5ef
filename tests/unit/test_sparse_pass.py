"""The sparse training pass against the dense one: single passes, and 100 steps of several methods.

In double precision, both agree within 1e-9 of the largest value. In single precision, rounding
differs by about 1e-6 in a pass, and 100 steps may multiply this: the bound is 1e-3 of the largest
weight. The sets of active connections are equal in both.
"""

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robsparse.baselines import rigl, snip
from robsparse.baselines import set as set_method
from robsparse.fast import sparse_pass as module
from robsparse.fast.sparse_pass import sparse_pass
from robsparse.kernels.library import library
from robsparse.method import bcs
from robsparse.models import small
from robsparse.models._layers import TensorFlowConv2d
from robsparse.schema import Fit
from robsparse.schema.threat import Crafting
from robsparse.sparsity.layers import prunable
from robsparse.sparsity.masks import (
    apply_masks,
    effective_weights,
    magnitude_masks,
    plain_state,
)
from robsparse.study.cells import Layout
from robsparse.training import loop
from robsparse.training.checkpoints import Interrupted
from robsparse.training.objectives import OBJECTIVES, Attacker
from robsparse.training.stages import FixedMaskStage, Run, begin_stage

pytestmark = pytest.mark.skipif(library() is None, reason="the kernels are not built")

IMAGES, SIZE = 6, 8
DRAW = torch.Generator().manual_seed(0)
X = torch.rand(IMAGES, 3, SIZE, SIZE, generator=DRAW)
Y = torch.randint(4, (IMAGES,), generator=DRAW)


class Pools(nn.Module):
    """Like VGG: biases, pooling, a stride, and a view at the end."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, 2, 1)
        self.three = TensorFlowConv2d(8, 8)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(8)])
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norms[0](self.one(x))), 2)
        x = F.relu(self.norms[1](self.two(x)))
        x = F.avg_pool2d(F.relu(self.three(F.pad(x, (0, 1, 0, 1)))), 2, padding=1)
        return self.out(x.view(len(x), 8, -1).mean(2))


NETS = {
    "small_resnet": lambda: small.build("small_resnet", small.Params(width=4), (3, SIZE, SIZE), 4),
    "small_cnn": lambda: small.build("small_cnn", small.Params(width=4), (3, SIZE, SIZE), 4),
    "silu": lambda: small.build(
        "small_resnet", small.Params(width=4, activation="silu"), (3, SIZE, SIZE), 4
    ),
    "pools": Pools,
}


def network(name, dtype=torch.float64):
    """Return a network. With a bias of 0, batch norm of a channel without active weights would be 0
    with a rounding error, which decides the gradient of the ReLU after it."""
    torch.manual_seed(0)
    model = NETS[name]().to(dtype).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)
    return model


def one_pass(model, x, *, sparse):
    """Return loss and logits, all gradients, and all buffers after a pass."""
    used = {}
    model.zero_grad()
    with effective_weights(model):
        if sparse:
            with sparse_pass(model, x, torch.float32, used):
                logits = model(x)
        else:
            logits = model(x)
        F.cross_entropy(logits, Y[: len(x)]).backward()
    found = [logits.detach(), *(p.grad for p in model.parameters())]
    return [*found, *(b.clone() for b in model.buffers())], used


def largest_difference(some, others):
    """Return the largest difference of two lists of tensors, relative to their largest values."""
    return max(
        ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-4)).item()
        for a, b in zip(some, others, strict=True)
        if b.numel()
    )


# ---------------------------------------------------------------- one pass


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("images", [2, IMAGES])
def test_pass_has_the_outputs_gradients_and_statistics_of_the_dense_pass(name, density, images):
    results = []
    for sparse in (True, False):
        model = network(name)
        apply_masks(model, magnitude_masks(model, 1 - density))
        results.append(one_pass(model, X[:images].double(), sparse=sparse))
    (sparse, used), (dense, unused) = results
    assert set(used.values()) == {"sparse"}
    assert len(used) == sum(isinstance(m, nn.Conv2d) for m in network(name).modules())
    assert not unused
    assert largest_difference(sparse, dense) < 1e-9


def test_pass_in_channels_last_and_bf16_is_near_the_dense_pass():
    results = []
    for sparse in (True, False):
        model = network("small_resnet", torch.float32)
        apply_masks(model, magnitude_masks(model, 0.9))
        with torch.autocast("cpu", torch.bfloat16):
            x = X.contiguous(memory_format=torch.channels_last)
            results.append(one_pass(model, x, sparse=sparse)[0])
    assert largest_difference(results[0][:1], results[1][:1]) < 0.05


def test_layer_without_a_known_mask_is_dense():
    model = network("small_resnet")
    assert one_pass(model, X.double(), sparse=True)[1] == {}
    masks = magnitude_masks(model, 0.5)
    apply_masks(model, dict([*masks.items()][:1]))
    assert len(one_pass(model, X.double(), sparse=True)[1]) == 1


def test_paused_pass_is_dense():
    model, used = network("small_resnet"), {}
    apply_masks(model, magnitude_masks(model, 0.9))
    with effective_weights(model), sparse_pass(model, X.double(), torch.float32, used):
        with module.paused():
            model(X.double())
        assert used == {}
        model(X.double())
        assert used
    with module.paused():
        model(X.double())


def test_kernel_beyond_the_limits_is_dense():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 65, padding=32, dtype=torch.float64)
    apply_masks(model, {"": torch.rand(model.weight.shape) < 0.1})
    used = {}
    with effective_weights(model), sparse_pass(model, X.double(), torch.float32, used):
        out = model(X.double())
    assert torch.equal(out, model(X.double()))
    assert used == {}


def test_all_layers_are_dense_where_that_costs_less(monkeypatch):
    """The total decides: the first layer costs less in the sparse way, and each other one more."""
    costs = {}

    def costs_of(geometry, dtypes, images):
        assert (dtypes, images) == ((torch.float32, torch.float64), 1)
        return costs["first" if geometry.weight[1] == 3 else "others"]

    def computed(*, sparse):
        model = network("small_resnet")
        apply_masks(model, magnitude_masks(model, 0.5))
        return one_pass(model, X.double(), sparse=sparse)

    monkeypatch.setattr(module.costs, "training_costs_of", costs_of)
    costs["first"] = {"dense": 2.0, "sparse": [0.0, 0.0]}
    costs["others"] = {"dense": 1.0, "sparse": [0.6, 1.0]}
    used = computed(sparse=True)[1]
    assert len(used) == 9
    assert set(used.values()) == {"sparse"}
    costs["others"] = {"dense": 1.0, "sparse": [0.8, 1.0]}
    results, used = computed(sparse=True)
    assert set(used.values()) == {"dense"}
    assert all(map(torch.equal, results, computed(sparse=False)[0]))


def test_choice_changes_neither_network_nor_random_numbers():
    model = network("small_cnn")
    model.append(nn.Dropout(0.5))
    apply_masks(model, magnitude_masks(model, 0.5))
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    modes = [layer.training for layer in model.modules()]
    with effective_weights(model), sparse_pass(model, X.double(), torch.float32, {}):
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [layer.training for layer in model.modules()] == modes


def test_pattern_is_kept_while_the_mask_is_and_follows_its_changes():
    model = network("small_resnet")
    apply_masks(model, magnitude_masks(model, 0.9))
    layer = next(m for m in prunable(model).values() if isinstance(m, nn.Conv2d))
    one_pass(model, X.double(), sparse=True)
    first = dict(module._KNOWN[layer].patterns)
    one_pass(model, X.double(), sparse=True)
    assert module._KNOWN[layer].patterns == first
    with torch.no_grad():
        mask = layer.parametrizations.weight[0].mask
        mask.copy_(mask.flatten().flip(0).view_as(mask))
    results = [one_pass(model, X.double(), sparse=way)[0] for way in (True, False)]
    count = len(list(model.parameters())) + 1
    assert largest_difference(results[0][:count], results[1][:count]) < 1e-9
    assert module._KNOWN[layer].patterns != first


# ---------------------------------------------------------------- 100 steps

FIT = Fit(epochs=5, lr=0.05)
STAGES = {
    "bcs": lambda: bcs.SamplingStage(bcs.Params(train=bcs.Train(epochs=5, lr=0.05))),
    "bcs drift": lambda: bcs.SamplingStage(
        bcs.Params(train=bcs.Train(epochs=5, lr=0.05), waking="drift", temperature=1e-5)
    ),
    "fixed": lambda: FixedMaskStage("finetune", FIT),
    "set": lambda: set_method.SetStage(set_method.Params(train=FIT.model_dump())),
    "rigl": lambda: rigl.RiglStage(rigl.Params(train=FIT.model_dump(), update_every=7)),
    "snip": lambda: snip.SnipStage(FIT),
}


def trained(stage, net, dtype, *, sparse, steps=100):
    """Return the run after some steps of the loop, and how its layers were computed."""
    draw = torch.Generator().manual_seed(1)
    run = Run(network(net, dtype), 0.9, torch.Generator().manual_seed(2), arch=net)
    run.sparse_compute = sparse
    begin_stage(run, stage, steps)
    attacker = Attacker(0.03, Crafting(steps=1, step_size=0.02), torch.Generator().manual_seed(3))
    objective = lambda *given: OBJECTIVES["at"](*given, 6.0)  # noqa: E731
    for step in range(steps):
        run.epoch = step // (steps // stage.fit.epochs)
        loop._set_step(run, stage, step)
        x = torch.rand(IMAGES, 3, SIZE, SIZE, generator=draw, dtype=torch.float64).to(dtype)
        y = torch.randint(4, (IMAGES,), generator=draw)
        loop.compute_gradients(run, stage, objective, attacker, (x, y))
        loop.update(run, stage)
    return run


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize(
    ("net", "dtype"),
    [("small_resnet", torch.float64), ("pools", torch.float32)],
    ids=["small_resnet fp64", "pools fp32"],
)
def test_hundred_steps_are_equal_on_both_paths(method, net, dtype):
    runs = [trained(STAGES[method](), net, dtype, sparse=way) for way in (True, False)]
    assert "sparse" in runs[0].computed.values()
    assert not runs[1].computed
    weights = [[m.weight.detach() for m in prunable(run.model).values()] for run in runs]
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one != 0, other != 0)
    bound = 1e-9 if dtype == torch.float64 else 1e-3
    states = [[*plain_state(run.model).values()] for run in runs]
    assert largest_difference(weights[0], weights[1]) < bound
    assert largest_difference(*states) < bound


def test_steps_that_need_all_gradients_are_dense():
    stage = STAGES["rigl"]()
    run = trained(stage, "small_resnet", torch.float64, sparse=True, steps=10)
    run.step, run.steps = 7, 100
    assert stage.reads_all_gradients(run)
    run.step = 8
    assert not stage.reads_all_gradients(run)
    run.step = 0
    assert STAGES["snip"]().reads_all_gradients(run)


# ---------------------------------------------------------------- a study


@pytest.fixture
def train_bcs(study_data, load_study, tmp_path):
    """train_bcs(folder, sparse_compute, stops) -> the record; the run stops after these steps."""

    def train(folder, sparse_compute, stops=()):
        study_data["training"] |= {"batch_size": 200, "sparse_compute": sparse_compute}
        study_data["grid"] |= {"methods": ["bcs"], "objectives": ["at"]}
        study = load_study(study_data)
        (cell,) = study.cells()
        layout = Layout(tmp_path / folder)
        for steps in stops:
            with contextlib.suppress(Interrupted):
                loop.train_cell(study, cell, layout, device="cpu", max_steps=steps)
        loop.train_cell(study, cell, layout, device="cpu")
        return json.loads(layout.training(cell).read_text())

    return train


def test_record_says_which_layers_ran_sparse_also_of_an_interrupted_run(train_bcs):
    whole = train_bcs("whole", "auto")
    assert whole["computed"]
    assert set(whole["computed"].values()) == {"sparse"}
    resumed = train_bcs("resumed", "auto", stops=[3])
    assert resumed["computed"] == whole["computed"]
    assert resumed["weights"] == whole["weights"]


def test_sparse_compute_off_is_dense(train_bcs):
    assert train_bcs("dense", "off")["computed"] == {}
