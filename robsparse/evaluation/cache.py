"""The cache of an evaluation: results of finished attacks and batches, so that an evaluation that
was stopped continues where it was.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robsparse.base import registry
from robsparse.base.files import atomic
from robsparse.compute import perturb, randomness
from robsparse.compute.machine import device_name
from robsparse.datasets import Part
from robsparse.networks import weights
from robsparse.study import fingerprints, source_code

PROBED = 4  # images whose outputs and gradients identify a network


class Cache:
    """Arrays of finished results, one file each.

    A file is written whole or not at all. Its name is a digest of the basis (what decides the
    results of one attack, see `basis_of`) and of the name of the result.
    """

    def __init__(self, folder: Path | None, basis: str = "") -> None:
        """Store results in `folder`; with None, store nothing."""
        self.folder, self.basis = folder, basis

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a result, or None where it is not finished or its file is damaged."""
        if self.folder is None:
            return None
        path = self._path(self.folder, name)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, name: str, **arrays: Any) -> None:
        """Store the arrays of a finished result."""
        if self.folder is None:
            return
        path = self._path(self.folder, name)
        with atomic(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)

    def _path(self, folder: Path, name: str) -> Path:
        digest = hashlib.sha256(f"{self.basis}\x1f{name}".encode()).hexdigest()[:24]
        return folder / f"{digest}.npz"


def basis_of(network: str, attack: str, device: torch.device, **decided: Any) -> str:
    """Digest of everything that decides the results of one attack, besides its own parameters.

    Args:
        network: `network_digest` of the attacked network with the images.
        attack: the registered name of the attack, whose code counts.
        device: where it runs; the name of a GPU counts too.
        decided: all else, such as norm, eps, seed and batch size.
    """
    module = registry.entry("attack", attack).module
    name = "cpu" if device.type == "cpu" else device_name(device)
    return fingerprints.cached_attack(network, module, device=name, **decided)


def network_digest(model: nn.Module, part: Part, device: torch.device) -> str:
    """Digest of a network in eval mode, and of the images and labels that it is attacked on.

    A network is its weights, the code of its modules, and what it computes: its outputs and input
    gradients for the first images. These change with an attribute that no setting and no file
    shows.
    """
    digest = hashlib.sha256(_code_digest(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.as_bytes(value))
    for value in (part.x_NCHW, part.y_N, *_outputs_and_gradients(model, part, device)):
        digest.update(weights.as_bytes(value))
    return digest.hexdigest()[:24]


def _code_digest(model: nn.Module) -> str:
    """Digest of the code of all layers that are not torch's own."""
    found = {type(module).__module__ for module in model.modules()}
    return source_code.digest(*sorted(n for n in found if n.partition(".")[0] != "torch"))


def _outputs_and_gradients(model: nn.Module, part: Part, device: torch.device) -> list[Tensor]:
    """Logits and input gradients; random numbers come from a fixed seed and are restored."""
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
