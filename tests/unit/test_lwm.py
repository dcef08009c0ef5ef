"""LWM's mask against an independent sort."""

import torch
from torch import nn

from robsparse.baselines import lwm
from robsparse.sparsity.layers import prunable
from robsparse.training.stages import Run


def test_mask_equals_a_sort_of_the_magnitudes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    before = {name: m.weight.detach().clone() for name, m in prunable(model).items()}
    (stage,) = lwm.stages(lwm.Params())
    stage.before_fit(Run(model=model, sparsity=0.9, generator=torch.Generator()))
    for name, module in prunable(model).items():
        size = before[name].numel()
        magnitudes = before[name].flatten().abs().tolist()
        ranked = sorted(range(size), key=magnitudes.__getitem__, reverse=True)
        kept = set(ranked[: size - int(size * 0.9 + 1e-9)])
        expected = [i in kept for i in range(size)]
        assert (module.weight != 0).flatten().tolist() == expected
        assert torch.equal(module.weight[module.weight != 0], before[name][module.weight != 0])
