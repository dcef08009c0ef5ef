"""Norm and radius of the adversary, and how training examples are crafted. Imports no torch."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.fields import Radius, Strict, radius_error

Norm = Literal["Linf", "L2"]

Precision = Literal["auto", "fp32", "tf32", "bf16"]

Backend = Literal["auto", "eager", "compiled", "graph"]


class Threat(Strict):
    """Norm and radius of the adversary, in training and in attacks.

    norm: norm of a perturbation: the largest change of a pixel, or the length of all changes.
    """

    norm: Norm = "Linf"
    eps: Radius = Field(
        description="radius in [0,1] pixel units, a number or a ratio like 8/255; for L2 the "
        "length of the whole perturbation"
    )

    @model_validator(mode="after")
    def _within_the_norm(self) -> "Threat":
        if error := radius_error(self.norm, self.eps):
            raise PydanticCustomError("radius", "{error}", {"key": "eps", "error": error})
        return self


class AttackParams(Strict):
    """Parameters of an attack that perturbs images.

    norm, eps: None for those of the study's threat. Pixels are in [0,1]; in L2, eps is the length
        of the whole perturbation. An attack in another norm than the threat must set eps.
    """

    norm: Norm | None = None
    eps: Radius | None = None

    @property
    def qualifier(self) -> str:
        """How these settings differ from the attack that the printed name stands for; "" if not.

        It is printed in brackets after the name. A well-known attack overrides it. Results with a
        qualifier are not compared with published numbers.
        """
        return ""


class Crafting(Strict):
    """Inner maximisation of training with PGD.

    steps: number of steps.
    step_size: length of a step in pixel units, a number or a ratio like 2/255.
    """

    steps: PositiveInt = 10
    step_size: Radius
    bn_mode: Literal["eval", "train"] = Field(
        "eval", description="mode of batch norm while crafting (ADMM's authors: train)"
    )
    precision: Precision = Field(
        "auto",
        description="number format of convolutions while crafting; auto: bf16 if the device is "
        "much faster with it, else fp32 (validation and attacks always use fp32)",
    )
    backend: Backend = Field(
        "auto",
        description="how the folded view runs while crafting; graph: as a CUDA graph; auto: eager",
    )
    eps_warmup: NonNegativeInt = Field(
        0,
        description="number of first epochs in which eps and step_size rise linearly from 0, for "
        "networks that are trained from scratch",
    )
