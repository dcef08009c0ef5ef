"""Loads the compact file of a network and runs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robsparse.base.errors import UsageError
from robsparse.fast.folding import folded_view
from robsparse.networks import compact
from robsparse.networks.compact import Description


def load(path: str | Path) -> "LoadedNetwork":
    """Return the network of a compact file, ready to use: x_NCHW in [0,1] -> logits_NK.

    `robsparse export` writes such a file. No code of the file is executed.

    Raises:
        UsageError: if the file is missing, damaged or no compact file.
    """
    return LoadedNetwork(*compact.read(Path(path)))


class LoadedNetwork(nn.Module):
    """A trained network in use: x_NCHW in [0,1] -> logits_NK.

    If the network normalises its images, it does so itself. It runs on its folded view
    (`robsparse.fast.folding`), whose outputs are those of the network up to rounding. The gradient
    of images can be computed, that of weights cannot. The network stays in eval mode.

    network: the plain network, with the state dict that was exported.
    description: what the file says: arch, data set, image shape, classes, provenance.
    """

    def __init__(self, network: nn.Module, description: Description) -> None:
        super().__init__()
        self.network, self.description = network.requires_grad_(False), description
        super().train(False)
        # The view, and the images and weights that it was made for. A view is made at the first
        # call, because it is compared with the network on images.
        self._made: tuple[tuple[object, ...], nn.Module] | None = None

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Return logits_NK.

        Raises:
            UsageError: if the images have another shape than those of the training, or integers.
        """
        shape = self.description.image_shape
        if x_NCHW.shape[1:] != shape or not x_NCHW.is_floating_point():
            raise UsageError(
                f"images: expected numbers in [0,1] of shape (N, {shape[0]}, {shape[1]}, "
                f"{shape[2]}), found {x_NCHW.dtype} of shape {tuple(x_NCHW.shape)}"
            )
        if not torch.is_inference_mode_enabled():
            return self._view_for(x_NCHW)(x_NCHW)
        # A view compares its kernels with the network, which needs gradients, and keeps tensors for
        # later calls. Neither is possible in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return self.forward(x_NCHW.clone())

    def train(self, mode: bool = True) -> "LoadedNetwork":
        """Stay in eval mode."""
        return self

    def _view_for(self, x_NCHW: Tensor) -> nn.Module:
        """Return the folded view for images of this kind, made anew if a weight was changed."""
        versions = sum(tensor._version for tensor in self.network.parameters())
        kind = (x_NCHW.dtype, x_NCHW.device, versions)
        if self._made is None or self._made[0] != kind:
            view = folded_view(self.network, x_NCHW.detach())
            if not len(x_NCHW):
                return view
            self._made = kind, view
        return self._made[1]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "LoadedNetwork":
        self._made = None  # `to`, `double` and their like change tensors without a new version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # a copy makes its own view
