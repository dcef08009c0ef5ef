"""The optimiser of the training loop against that of torch."""

import subprocess
import sys

import pytest
import torch

from robsparse.compute.optimizer import SGD

SETTINGS = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
]


def trained(kinds, settings):
    """Weights and state after three steps with each kind of optimiser, one continuing the other."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=generator).requires_grad_() for _ in range(2)]
    state = None
    for kind in kinds:
        optimizer = kind(weights[:1], **settings)
        optimizer.add_param_group({"params": weights[1:], "lr": 0.01})
        if state:
            optimizer.load_state_dict(state)
        for _ in range(3):
            optimizer.zero_grad()
            sum((w**3).sum() for w in weights).backward()
            optimizer.step()
        state = optimizer.state_dict()
    return [w.detach() for w in weights], state


@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_and_state_equal_those_of_torch(settings):
    theirs, their_state = trained([torch.optim.SGD, torch.optim.SGD], settings)
    for kinds in ([SGD, SGD], [SGD, torch.optim.SGD], [torch.optim.SGD, SGD]):
        ours, state = trained(kinds, settings)
        assert all(map(torch.equal, ours, theirs))
        assert state["param_groups"] == their_state["param_groups"]
        assert state["state"].keys() == their_state["state"].keys()
        for index, values in state["state"].items():
            expected = their_state["state"][index]["momentum_buffer"]
            assert values["momentum_buffer"] is expected is None or torch.equal(
                values["momentum_buffer"], expected
            )


def test_a_step_records_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    optimizer = SGD([weight], lr=0.1)
    (weight**2).sum().backward()
    optimizer.step()
    assert weight.is_leaf
    assert weight.tolist() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize(("kind", "loaded"), [("optimizer.SGD", False), ("torch.optim.SGD", True)])
def test_only_the_optimiser_of_torch_loads_its_compiler(kind, loaded):
    code = (
        "import sys, torch; from robsparse.compute import optimizer\n"
        "weight = torch.ones(2, requires_grad=True)\n"
        f"own = {kind}([weight], lr=0.1)\n"
        "own.zero_grad(); weight.sum().backward(); own.step()\n"
        "own.load_state_dict(own.state_dict())\n"
        f"assert ('torch._dynamo' in sys.modules) == {loaded}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
