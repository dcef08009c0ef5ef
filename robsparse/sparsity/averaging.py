"""Exponential moving average of the weights of a network. Zero weights stay zero in it.

Source: Izmailov et al., UAI 2018; for robust training Gowal et al., 2020, and Rebuffi et al.,
NeurIPS 2021. The decay of the first steps and the statistics of batch norm are those of
imrahulr/adversarial_robustness_pytorch. These authors train dense networks. The rule for pruned
and regrown connections is ours.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robsparse.sparsity.layers import prunable


class WeightAverage:
    """The average of a network over the steps of a stage, as a separate plain network.

    After step t = 0, 1, ... average <- d average + (1 - d) w, with d = min(decay, (1+t) / (10+t)).
    w are the weights of the forward pass, the biases and the parameters of batch norm. Buffers,
    such as the statistics of batch norm, are copied from the network and not averaged.

    A weight that is exactly 0 in the network is exactly 0 in the average. If a weight was 0 after
    the previous step, its average starts from its new value. If a connection is pruned and regrown
    in the same step, its weight is 0 after no step, so its average continues.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy a network without parametrisations. Call `restart` before the first update."""
        self.decay, self.steps = decay, 0
        self.network = copy.deepcopy(model).requires_grad_(requires_grad=False)

    def restart(self, model: nn.Module) -> None:
        """Begin a stage: copy the network to the average, and set t to 0."""
        self.steps = 0
        for value, new in self._pairs(model):
            value.copy_(new)

    def update(self, model: nn.Module) -> None:
        """Update the average with the network after a step."""
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
        """Set the same weights to 0 as in the network. Copy weights that were 0 before."""
        layers = prunable(model)
        with torch.no_grad():
            for name, module in prunable(self.network).items():
                new = layers[name].weight
                known = (new != 0) & (module.weight != 0)
                module.weight.copy_(torch.where(known, module.weight, new))

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"steps": self.steps, "network": self.network.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a result of `state`."""
        self.steps = state["steps"]
        self.network.load_state_dict(state["network"])

    @torch.no_grad()
    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the average with the current tensor of the network."""
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        now |= {f"{name}.weight": module.weight for name, module in prunable(model).items()}
        own = [*self.network.named_parameters(), *self.network.named_buffers()]
        return [(value, now[name].detach()) for name, value in own]
