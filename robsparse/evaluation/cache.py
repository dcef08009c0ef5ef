"""The cache of an evaluation: results of finished attacks and batches.

An interrupted evaluation continues from its cache.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robsparse.base.errors import UsageError
from robsparse.base.files import read_arrays, write_arrays
from robsparse.compute import perturb, randomness
from robsparse.compute.machine import device_name
from robsparse.datasets import Part
from robsparse.networks import weights
from robsparse.study import fingerprints, source_code

PROBED = 4  # number of images: their outputs and gradients identify a network


class Cache:
    """Arrays of finished results, in one file for each result.

    A file is written completely or not at all. The name of a file is a digest. It depends on the
    name of the result and on everything that decides the results of an attack (`cache_basis`).
    """

    def __init__(self, folder: Path | None, basis: str = "") -> None:
        """Store results in `folder`, or store nothing if `folder` is None."""
        self.folder, self.basis = folder, basis

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return the arrays of a result, or None if it is not finished.

        If its file is damaged, a line says so, and the result is None.
        """
        if self.folder is None:
            return None
        path = self._path(self.folder, name)
        if not path.exists():
            return None
        try:
            return read_arrays(path, "this part of the evaluation is computed again")
        except UsageError as error:
            print(error, flush=True)
            return None

    def put(self, name: str, **arrays: Any) -> None:
        """Store the arrays of a finished result."""
        if self.folder is None:
            return
        write_arrays(self._path(self.folder, name), arrays)

    def keep(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
        """Return the arrays of a result. If it is not finished, compute and store it."""
        found = self.get(name)
        if found is None:
            found = {key: np.asarray(value) for key, value in compute().items()}
            self.put(name, **found)
        return found

    def clear(self) -> None:
        """Remove all results from the folder, of any basis."""
        if self.folder is not None:
            for path in self.folder.glob("*.npz"):
                path.unlink()

    def _path(self, folder: Path, name: str) -> Path:
        digest = hashlib.sha256(f"{self.basis}\x1f{name}".encode()).hexdigest()[:24]
        return folder / f"{digest}.npz"


def cache_basis(network: str, module: str, device: torch.device, **decided: Any) -> str:
    """Return a digest of everything that decides the results of one attack, but its parameters.

    The sanity checks count as one attack.

    Args:
        network: `network_digest` of the attacked network and the images.
        module: the module of the attack. The digest includes its code.
        device: the device of the attack. The digest includes the name of a GPU.
        decided: all other values, such as norm, eps, seed and batch size.
    """
    name = "cpu" if device.type == "cpu" else device_name(device)
    return fingerprints.cached_attack(network, module, device=name, **decided)


def network_digest(model: nn.Module, part: Part, device: torch.device) -> str:
    """Return a digest of a network in eval mode and of the attacked images and labels.

    The digest of a network includes its weights, the code of its modules, and its outputs and input
    gradients for the first images. Outputs and gradients can also show a changed attribute that is
    in no setting and in no file.
    """
    digest = hashlib.sha256(_code_digest(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.as_bytes(value))
    for value in (part.x_NCHW, part.y_N, *_outputs_and_gradients(model, part, device)):
        digest.update(weights.as_bytes(value))
    return digest.hexdigest()[:24]


def _code_digest(model: nn.Module) -> str:
    """Return a digest of the code of all layers that are not part of torch."""
    found = {type(module).__module__ for module in model.modules()}
    return source_code.digest(*sorted(n for n in found if n.partition(".")[0] != "torch"))


def _outputs_and_gradients(model: nn.Module, part: Part, device: torch.device) -> list[Tensor]:
    """Return logits and input gradients. The seed is fixed, and random states are restored."""
    if not len(part):
        return []
    x = part.x_NCHW[:PROBED].to(device, copy=True).requires_grad_(True)
    before = randomness.state(device)
    randomness.seed(0)
    try:
        with torch.enable_grad(), perturb.no_parameter_gradients(model):
            logits = model(x)
            if not logits.requires_grad:
                return [logits]
            return [logits, *torch.autograd.grad(logits.logsumexp(1).sum() + logits[:, 0].sum(), x)]
    finally:
        randomness.restore(before, device)
