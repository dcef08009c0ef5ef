"""The execution of a traced network: its own backward pass gives the gradient of torch."""

from typing import Any

import pytest
import torch
from torch import nn

from robsparse.fast import folding

X = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Block(nn.Module):
    """A stem, a residual block with a ReLU after the addition, and pooling. `end` varies."""

    def __init__(self, end=lambda block, x: x):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.short = nn.Conv2d(4, 4, 1)
        self.end, self.out = end, nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norms[0](self.stem(x)))
        inside = torch.relu(self.norms[1](self.one(x)))
        x = torch.relu(self.norms[2](self.two(inside)) + self.residual(x))
        return self.out(self.end(self, x).mean((2, 3)))

    def residual(self, x):
        return x


class Projected(Block):
    def residual(self, x):
        return self.short(x)


class Twice(Block):
    """The same map is the input of a convolution and is added to its result."""

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.one(x) + x)
        return self.out((self.two(x) + self.short(x) + x).mean((2, 3)))


ENDS = {
    "pool": lambda block, x: nn.functional.max_pool2d(x, 2),
    "average": lambda block, x: nn.functional.avg_pool2d(x, 2) + 1,
    "scaled": lambda block, x: x * x.size(0) + x.flatten(1).sum(1)[:, None, None, None],
    "before": lambda block, x: torch.relu(block.norms[0](x)) * 2 + x,
}


def prepared(model: nn.Module, density: float) -> nn.Module:
    torch.manual_seed(0)
    model = model.double()
    for _ in range(3):
        model(torch.rand_like(X))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) < density
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("density", [1.0, 0.15])
@pytest.mark.parametrize("make", [Block, Projected, Twice], ids=lambda made: made.__name__)
@pytest.mark.parametrize("end", ENDS)
def test_outputs_and_gradients_are_those_of_torch(make, end, density):
    model = prepared(make(ENDS[end]), density)
    view: Any = folding.folded_view(model, X)
    assert view.status.program.execution is not None
    x = X.clone().requires_grad_()
    found, expected = view(x), model(x)
    assert torch.allclose(found, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(view(x), found)
    for column in range(3):  # several backward passes of one forward pass
        slopes = [
            torch.autograd.grad(out[:, column].sum(), x, retain_graph=True)[0]
            for out in (found, expected)
        ]
        assert torch.allclose(*slopes, atol=1e-12)


class InPlace(Block):
    def forward(self, x):
        x = nn.functional.avg_pool2d(self.stem(x), 2)
        return self.out(x.mul_(2).mean((2, 3)))


class Parts(Block):
    def forward(self, x):
        one, two = self.stem(x).chunk(2, 1)
        return self.out(torch.cat([one * two, two], 1).mean((2, 3)))


@pytest.mark.parametrize("make", [InPlace, Parts], ids=lambda made: made.__name__)
def test_torch_runs_a_program_that_cannot_be_executed(make):
    model = prepared(make(), 1.0)
    view: Any = folding.folded_view(model, X)
    assert folding.runs_on(view) == "view"
    assert view.status.program.execution is None
    x = X.clone().requires_grad_()
    slopes = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (view, model)]
    assert torch.allclose(*slopes, atol=1e-12)
