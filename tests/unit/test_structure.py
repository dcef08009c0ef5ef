"""Memory formats that a network accepts."""

import pytest
import torch
from torch import nn

from robsparse.fast import structure


class Flat(nn.Module):
    """Flattens with `view`, which refuses channels-last images."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.out = nn.Linear(2 * 4 * 4, 3)

    def forward(self, x):
        return self.out(self.norm(x).view(x.size(0), -1))


@pytest.fixture
def images():
    return torch.rand(20, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def test_refused_memory_format_prints_one_line(images, capsys):
    model = Flat()
    assert structure.runs(model, images)
    assert not structure.runs(model, images.to(memory_format=torch.channels_last))
    [line] = capsys.readouterr().out.splitlines()
    assert "channels first" in line


def test_network_is_not_changed(images):
    model = Flat().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert structure.runs(model, images)
    assert model.training
    assert model.norm.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_out_of_memory_is_raised(images):
    def fail(*_):
        raise RuntimeError("not enough memory: you tried to allocate memory")

    model = Flat()
    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        structure.runs(model, images)
