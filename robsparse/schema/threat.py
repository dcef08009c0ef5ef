"""How far an adversary may go, and how training examples are crafted. No torch in here."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.fields import Radius, Strict, radius_error

Norm = Literal["Linf", "L2"]

Precision = Literal["auto", "fp32", "tf32", "bf16"]

Backend = Literal["auto", "eager", "compiled", "graph"]


class Threat(Strict):
    """The adversary that models are trained against and attacked with."""

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
    """Parameters of an attack that perturbs images: norm and eps where not those of the threat.

    eps in the norm: for L2 the length of the whole perturbation, pixels in [0,1]. An attack of
    another norm than the threat's has an eps of its own.
    """

    norm: Norm | None = None
    eps: Radius | None = None

    @property
    def qualifier(self) -> str:
        """What its printed name must say beside it: how it differs from what that name stands for.

        An attack that others compare with overrides it; its published numbers are then compared
        with those of the unqualified attack alone.
        """
        return ""


class Crafting(Strict):
    """Inner maximisation of training: PGD with `steps` steps of `step_size`."""

    steps: PositiveInt = 10
    step_size: Radius
    bn_mode: Literal["eval", "train"] = Field(
        "eval", description="mode of batch norm while crafting (ADMM's authors: train)"
    )
    precision: Precision = Field(
        "auto",
        description="what convolutions compute in while crafting; auto: bf16 where the device is "
        "much faster at it, else fp32 (validation and attacks are always in fp32)",
    )
    backend: Backend = Field(
        "auto",
        description="how the folded view runs while crafting; graph: as a CUDA graph; auto: eager",
    )
    eps_warmup: NonNegativeInt = Field(
        0,
        description="first epochs of a network trained from scratch in which eps and step_size "
        "rise linearly from 0",
    )
