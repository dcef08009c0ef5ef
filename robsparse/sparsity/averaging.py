"""Exponential moving average of a network's weights that keeps its zeros.

Source: Izmailov et al., UAI 2018; for robust training Gowal et al., 2020, and Rebuffi et al.,
NeurIPS 2021. The decay of the first steps and the statistics of batch norm are those of
imrahulr/adversarial_robustness_pytorch. What happens to connections that change is our own: the
authors train dense networks.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robsparse.sparsity.layers import prunable


class WeightAverage:
    """The average of a network over the steps of a stage, as a plain network of its own.

    After step t = 0, 1, ... average <- d average + (1 - d) w, with d = min(decay, (1+t) / (10+t)).
    w are the weights that the network computes with, biases and the parameters of batch norm. All
    buffers, such as the statistics of batch norm, are those of the network, not averaged.

    A weight that is exactly 0 in the network is exactly 0 in the average. A weight that was 0 after
    the step before starts from its new value. A connection that is pruned and regrown within one
    step is never seen as 0, so its average goes on.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy a network without parametrisations; `restart` comes before the first update."""
        self.decay, self.steps = decay, 0
        self.network = copy.deepcopy(model).requires_grad_(requires_grad=False)

    def restart(self, model: nn.Module) -> None:
        """Begin a stage: the average is the network itself, and t is 0."""
        self.steps = 0
        for value, new in self._pairs(model):
            value.copy_(new)

    def update(self, model: nn.Module) -> None:
        """Take the network after a step into the average."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        self.follow(model)
        averaged = {id(parameter) for parameter in self.network.parameters()}
        for value, new in self._pairs(model):
            if id(value) in averaged:
                value.lerp_(new, 1 - decay)
            else:
                value.copy_(new)

    def follow(self, model: nn.Module) -> None:
        """Take over which weights are 0; those that were 0 before get the network's values."""
        theirs = prunable(model)
        with torch.no_grad():
            for name, module in prunable(self.network).items():
                new = theirs[name].weight
                known = (new != 0) & (module.weight != 0)
                module.weight.copy_(torch.where(known, module.weight, new))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"steps": self.steps, "network": self.network.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.steps = state["steps"]
        self.network.load_state_dict(state["network"])

    @torch.no_grad()
    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of the average, and the one that the network computes with now."""
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        now |= {f"{name}.weight": module.weight for name, module in prunable(model).items()}
        mine = [*self.network.named_parameters(), *self.network.named_buffers()]
        return [(value, now[name].detach()) for name, value in mine]
