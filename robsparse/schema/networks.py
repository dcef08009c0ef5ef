"""Parameters that several architectures share."""

from typing import Literal

from pydantic import Field

from robsparse.schema.fields import Normalised

Activation = Literal["relu", "silu"]


class Activated(Normalised):
    """Parameters of a network with a choice of the activation.

    silu is x * sigmoid(x), also called swish. Source: Hendrycks and Gimpel (2016); Elfwing et al.
    (2018). Initial weights are those of the network with relu.
    """

    activation: Activation = Field(
        "relu", description="activation of every layer: relu, or silu, which is x * sigmoid(x)"
    )


class Residual(Activated):
    """padding: where a 3x3 convolution of stride 2 adds zeros.

    "symmetric": one row or column on every side. "tensorflow": as the BCS authors' TensorFlow; if
    a side is even, only at the bottom or right. Trained weights need the padding and the activation
    that they were trained with.
    """

    padding: Literal["symmetric", "tensorflow"] = "symmetric"
