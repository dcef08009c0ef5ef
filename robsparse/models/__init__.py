"""Architectures. Each file defines these names:

NAMES: the architectures that the file builds.
SMALLEST: the smallest side of the images in pixels; one number, or one for each name.
Params: the parameters of the architectures.
build: returns a network.
"""

from pydantic import BaseModel
from torch import nn

from robsparse.base import registry


def build(
    name: str, params: BaseModel, image_shape: tuple[int, int, int], classes: int
) -> nn.Module:
    """Return a new network that maps x_NCHW in [0,1] to logits_NK.

    The initial weights are drawn from torch's global generator; seed it first.

    Args:
        name: of the architecture.
        params: its parameters.
        image_shape: channels, height and width of the images.
        classes: number of logits.
    """
    return registry.load("arch", name).build(name, params, image_shape, classes)
