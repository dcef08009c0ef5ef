"""The sections of a config as pydantic models, and the names that a `Params` model may use.

Imports base alone and no torch.
"""

from robsparse.schema.fields import Name, Radius, Share, Sparsity, Strict
from robsparse.schema.sections import (
    AttackParams,
    Crafting,
    Evaluation,
    Finetune,
    Fit,
    FromScratch,
    Grid,
    Machine,
    Objective,
    Selection,
    Table,
    Threat,
    Training,
)

__all__ = [
    "AttackParams",
    "Crafting",
    "Evaluation",
    "Finetune",
    "Fit",
    "FromScratch",
    "Grid",
    "Machine",
    "Name",
    "Objective",
    "Radius",
    "Selection",
    "Share",
    "Sparsity",
    "Strict",
    "Table",
    "Threat",
    "Training",
]
