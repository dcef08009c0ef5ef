"""Gradual magnitude pruning: training from scratch that prunes more and more weights.

Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1. Between the shares `begin`
and `end` of training, every `update_every` steps, each layer is pruned to the sparsity
s * (1 - (1 - (t - t_begin) / (t_end - t_begin))^3). The smallest weights are pruned.

Differs from the paper: a pruned weight stays 0. In the paper it keeps its value, and it becomes
active again if other weights become smaller.
"""

from typing import Any

from pydantic import Field, PositiveInt, model_validator

from robsparse.schema import FromScratch, Share, Strict
from robsparse.sparsity.budgets import layer_keep_counts
from robsparse.sparsity.masks import top_k_mask
from robsparse.training.dynamic import MaskedStage, masked_layers, set_masks
from robsparse.training.stages import Run, Stage

LABEL = "Gradual magnitude"


class Params(Strict):
    """train: how the network is trained."""

    train: FromScratch = FromScratch()
    begin: Share = Field(0.0, description="share of training after which pruning begins")
    end: float = Field(0.5, gt=0, le=1, description="share of training after which pruning ends")
    update_every: PositiveInt = Field(100, description="steps between two prunings")

    @model_validator(mode="after")
    def _in_order(self) -> "Params":
        if self.begin >= self.end:
            raise ValueError(f"expected begin to be less than end = {self.end}")
        return self


class GradualStage(MaskedStage):
    """Train and prune. An epoch can be selected after the last pruning."""

    selectable = False

    def __init__(self, params: Params) -> None:
        super().__init__(params.train)
        self.params = params

    def after_step(self, run: Run) -> None:
        begin, end = self.params.begin * run.steps, self.params.end * run.steps
        done = min(1.0, (run.step + 1 - begin) / (end - begin))
        last = done == 1.0 and not self.selectable
        if done > 0 and (last or (done < 1 and (run.step + 1) % self.params.update_every == 0)):
            sparsity = round(run.sparsity * (1 - (1 - done) ** 3), 10)
            keep = layer_keep_counts(run.model, sparsity)
            set_masks(
                run,
                {
                    name: top_k_mask(weight.abs() * layer.mask, keep[name])
                    for name, weight, layer in masked_layers(run.model)
                },
            )
        self.selectable = done == 1.0

    def state(self) -> dict[str, Any]:
        return {"selectable": self.selectable}

    def load_state(self, state: dict[str, Any]) -> None:
        self.selectable = state["selectable"]


def stages(params: Params) -> list[Stage]:
    """Return one stage that trains from initial weights."""
    return [GradualStage(params)]
