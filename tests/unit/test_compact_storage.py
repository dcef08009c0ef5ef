"""BCS without memory for dormant connections gives the same bits as BCS with dense theta."""

import contextlib
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robsparse.fast import folding
from robsparse.method import bcs
from robsparse.schema.training import WeightPerturbation
from robsparse.sparsity.compact_rewiring import DORMANT
from robsparse.sparsity.compact_weight import CompactTheta, CompactWeight, hold_compactly
from robsparse.sparsity.layers import parametrisation, prunable, trained_weight
from robsparse.sparsity.masks import bake, effective_weights, plain_state
from robsparse.study.cells import Layout
from robsparse.training import loop
from robsparse.training.checkpoints import Interrupted
from robsparse.training.stages import FixedMaskStage, Run, begin_stage, state_bytes

IMAGES, STEPS = 5, 60


def network(width=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )


def begun(params, *, compact, sparsity=0.9, width=6, **settings):
    """Return a run and a stage of BCS before the first step."""
    generator = torch.Generator().manual_seed(2)
    run = Run(network(width), sparsity, generator, sparse_compute=compact, **settings)
    train = {"epochs": 5, "lr": 0.05} | params.get("train", {})
    stage = bcs.SamplingStage(bcs.Params(**params | {"train": bcs.Train(**train)}))
    begin_stage(run, stage, STEPS)
    return run, stage


def make_steps(run, stage, steps=range(STEPS)):
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x, y = torch.rand(IMAGES, 3, 8, 8, generator=draw), torch.arange(IMAGES) % 4
        run.epoch = step // (STEPS // stage.fit.epochs)
        loop._set_step(run, stage, step)
        run.model.train()
        with effective_weights(run.model):
            run.optimizer.zero_grad()
            F.cross_entropy(run.model(x), y).backward()
        loop.update(run, stage)
    return run


def dense_state(run):
    """Return the weights, all other parameters and buffers, and the velocities of active theta."""
    state = plain_state(run.model)
    for name, module in prunable(run.model).items():
        theta = trained_weight(module)
        velocity = run.optimizer.state[theta].get("momentum_buffer")
        if velocity is not None:
            active = theta.detach() > 0
            state[f"{name}.velocity"] = velocity[active]
    return state


def assert_same(one, other, *, signs=True):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        if signs and value.is_floating_point() and not name.endswith("velocity"):
            assert torch.equal(value.signbit(), other[name].signbit()), name


SETTINGS = {
    "default": {},
    "much noise": {"temperature": 1e-4},
    "reset": {"temperature": 1e-4, "momentum": "reset"},
    "dormant": {"temperature": 1e-4, "regrowth": "dormant"},
    "torch velocity": {
        "temperature": 1e-4,
        "train": {"velocity": "torch", "warmup": 1, "nesterov": True},
    },
    "no momentum": {"temperature": 1e-4, "train": {"momentum": 0.0}},
    "coupled decay": {
        "temperature": 1e-4, "momentum": "reset",
        "train": {"decay": "coupled", "weight_decay": 1e-3},
    },
    "fixed late": {"temperature": 1e-4, "rewiring": "until_last_drop"},
    "fixed from the start": {"rewiring": "never"},
}  # fmt: skip


@pytest.mark.parametrize("sparsity", [0.95, 0.2], ids=["sparse", "nearly full"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_all_steps_have_the_bits_of_dense_theta(settings, sparsity):
    runs = []
    for compact in (True, False):
        run, stage = begun(copy.deepcopy(SETTINGS[settings]), compact=compact, sparsity=sparsity)
        assert stage.compact == compact
        runs.append(make_steps(run, stage))
    own, dense = runs
    # After the active set is fixed, dormant zeros have no defined sign.
    assert_same(dense_state(own), dense_state(dense), signs="fixed" not in settings)
    assert own.connections.steps().equals(dense.connections.steps())
    assert own.connections.lifetimes().equals(dense.connections.lifetimes())
    assert torch.equal(own.generator.get_state(), dense.generator.get_state())
    if settings != "fixed from the start":
        assert own.connections.steps()["pruned"].to_numpy().sum() > 8


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        ({"waking": "drift"}, {}),
        ({"pattern": "2:4"}, {}),
        ({"train": {"decay": "coupled"}}, {}),
        ({}, {"awp": WeightPerturbation()}),
    ],
    ids=["drift", "pattern", "coupled decay", "awp"],
)
def test_dense_theta_where_a_dormant_theta_matters(params, settings):
    assert not begun(params, compact=True, **settings)[1].compact


@pytest.mark.parametrize("momentum", ["keep", "reset"])
def test_dormant_connection_holds_only_a_velocity_that_matters(momentum):
    run, stage = begun({"temperature": 1e-4, "momentum": momentum}, compact=True)
    make_steps(run, stage)
    for module in prunable(run.model).values():
        theta, layer = trained_weight(module), parametrisation(module, CompactTheta)
        assert (theta > 0).all()
        assert len(theta) == len(layer.positions)
        assert len(theta) == len(run.optimizer.state[theta]["momentum_buffer"])
        assert (layer.positions.diff() > 0).all()
    dormant = run.optimizer.state[DORMANT]
    velocities, positions = dormant["momentum_buffer"].abs(), dormant["positions"].tolist()
    assert (velocities > stage._smallest_velocity(torch.float32)).all()
    assert len(positions) == len(velocities) == len(set(positions))
    assert not set(positions) & set(stage.rewiring.active.tolist())
    assert (len(positions) > 0) == (momentum == "keep")


def test_old_velocities_are_forgotten():
    run, stage = begun({"temperature": 1e-4}, compact=True)
    make_steps(run, stage)
    dormant = run.optimizer.state[DORMANT]
    assert len(dormant["positions"]) > 5
    dormant["momentum_buffer"].fill_(1e-25)
    old = set(dormant["positions"].tolist())
    make_steps(run, stage, range(10))
    left = dict(
        zip(*(part.tolist() for part in run.optimizer.state[DORMANT].values()), strict=True)
    )
    assert all(abs(left[position]) > 1e-10 for position in old & left.keys())


def test_interrupted_run_has_the_bits_of_a_whole_one(train_bcs):
    whole = train_bcs("whole")
    resumed = train_bcs("resumed", stops=[1, 5, 3])
    assert resumed["weights"] == whole["weights"]
    assert resumed["cost"]["training_state_bytes"] == whole["cost"]["training_state_bytes"]
    dense = train_bcs("dense", awp={"gamma": 1e-9, "warmup": 10**6})  # awp needs dense theta
    assert dense["curve"] == whole["curve"]
    assert dense["weights"] == whole["weights"]
    assert dense["cost"]["training_state_bytes"] > 2 * whole["cost"]["training_state_bytes"]


@pytest.fixture
def train_bcs(study_data, load_study, tmp_path):
    """train_bcs(folder, stops, **training) -> the record; the run stops after these steps."""

    def train(folder, stops=(), **training):
        study_data["training"] |= {"batch_size": 100, "sparse_compute": "auto"} | training
        study_data["grid"] |= {"methods": ["bcs"], "objectives": ["at"], "sparsities": [0.95]}
        study = load_study(study_data)
        (cell,) = study.cells()
        layout = Layout(tmp_path / folder)
        for steps in stops:
            with contextlib.suppress(Interrupted):
                loop.train_cell(study, cell, layout, device="cpu", max_steps=steps)
        loop.train_cell(study, cell, layout, device="cpu")
        return json.loads(layout.training(cell).read_text())

    return train


# ---------------------------------------------------------------- the weight


def layer_and_dense():
    """Return a linear layer with a compact weight, and theta and sign of it."""
    torch.manual_seed(0)
    layer, theta = nn.Linear(5, 7), torch.randn(7, 5)
    sign = torch.where(torch.rand(7, 5) < 0.5, -1.0, 1.0)
    hold_compactly(layer, theta, sign)
    return layer, theta.requires_grad_(), sign


def test_functions_of_torch_get_the_dense_weight_with_gradients():
    layer, theta, sign = layer_and_dense()
    weight, dense = layer.weight, sign * theta.relu()
    assert isinstance(weight, CompactWeight)
    assert weight.shape == (7, 5)
    assert weight.numel() == 35
    assert weight.requires_grad
    for result in (weight.detach(), weight + 0, torch.stack([weight])[0]):
        assert type(result) is torch.Tensor
        assert torch.equal(result, dense)
    assert torch.equal(weight.dense().signbit(), dense.signbit())
    x = torch.rand(3, 5)
    F.linear(x, weight).square().sum().backward()
    F.linear(x, dense).square().sum().backward()
    assert torch.equal(trained_weight(layer).grad, theta.grad[theta > 0])


def test_weight_never_gives_wrong_values_where_torch_does_not_ask_it():
    weight = layer_and_dense()[0].weight
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NotImplementedError):
        torch.add(weight, 1)


def test_state_dict_with_other_positions_can_be_loaded():
    layer, other = layer_and_dense()[0], nn.Linear(5, 7)
    hold_compactly(other, torch.eye(7, 5), torch.ones(7, 5))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dense(), layer.weight.dense())


def test_view_and_plain_network_are_those_of_dense_theta():
    results = []
    for compact in (True, False):
        run, stage = begun({}, compact=compact)
        make_steps(run, stage, range(3))
        run.model.eval()
        x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        view = folding.folded_view(run.model, x)
        assert folding.runs_on(view) == "view"
        logits = [view(x), run.model(x)]
        bake(run.model)
        results.append([*logits, run.model(x), *run.model.state_dict().values()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- its size


def test_state_of_a_step_is_counted():
    run = Run(network(), 0.5, torch.Generator())
    stage = FixedMaskStage("finetune", bcs.Train(epochs=5))
    begin_stage(run, stage, STEPS)
    make_steps(run, stage, [0])
    weights = sum(module.weight.numel() for module in prunable(run.model).values())
    parameters = sum(p.numel() for p in run.model.parameters())
    buffers = sum(b.nbytes for b in run.model.buffers())  # masks too
    assert state_bytes(run, stage) == 3 * 4 * parameters + buffers
    assert buffers >= weights


def test_compact_state_is_small():
    sizes = {}
    for compact in (True, False):
        run, stage = begun({}, compact=compact, sparsity=0.99, width=48)
        make_steps(run, stage, range(5))
        sizes[compact] = state_bytes(run, stage)
    norms_and_biases = 3 * 4 * (3 * 48 + 2 * 2 * 48 + 4)
    weights = sum(module.weight.numel() for module in prunable(run.model).values())
    assert sizes[False] > 16 * weights
    assert sizes[True] < 0.05 * 12 * weights + 2 * norms_and_biases
