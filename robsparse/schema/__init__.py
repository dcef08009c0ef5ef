"""The sections of a config as pydantic models.

A `Params` model may use the names that are listed here. All other code imports a class from the
module that defines it. This package imports only base, and no torch.
"""

from robsparse.schema.fields import CONTENT, PLACE, Name, Normalised, Pattern, Radius, Share, Strict
from robsparse.schema.imagesets import (
    Augmentation,
    Description,
    Downloaded,
    Images,
    image_shape,
    shapes_in_npz,
)
from robsparse.schema.networks import Activated, Activation, Residual
from robsparse.schema.threat import AttackParams
from robsparse.schema.training import Finetune, Fit, FlyingBirdParams, FromScratch, ScoreTraining

__all__ = [
    "CONTENT",
    "PLACE",
    "Activated",
    "Activation",
    "AttackParams",
    "Augmentation",
    "Description",
    "Downloaded",
    "Finetune",
    "Fit",
    "FlyingBirdParams",
    "FromScratch",
    "Images",
    "Name",
    "Normalised",
    "Pattern",
    "Radius",
    "Residual",
    "ScoreTraining",
    "Share",
    "Strict",
    "image_shape",
    "shapes_in_npz",
]
