"""Architectures. A file lists the names that it builds in NAMES and defines Params and `build`.

SMALLEST: pixels a side of the smallest images that it is for, a number or one for each name.
"""

from torch import nn

from robsparse.base import registry
from robsparse.schema import Strict


def build(name: str, params: Strict, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A freshly initialised network that maps x_NCHW in [0,1] to logits_NK.

    The weights are drawn from torch's global generator: seed it first.
    """
    return registry.load("arch", name).build(name, params, image_shape, classes)
