"""From a cell to its network: built from an arch, fetched from a zoo, or made by a function."""

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from robsparse import models
from robsparse.base.errors import UsageError, in_a_line
from robsparse.compute import perturb
from robsparse.datasets import Splits
from robsparse.networks import weights
from robsparse.schema.external import Match
from robsparse.study.cells import Cell
from robsparse.study.study import Study
from robsparse.thirdparty import zoo


def build(study: Study, cell: Cell, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network of a cell with initial weights; one from a zoo or a function has its own.

    The weights are drawn from torch's global generator: seed it first.
    """
    source = study.source(cell.method)
    if source.kind == "zoo":
        return zoo.load(source.name, study.base("dataset", cell.dataset), study.threat.norm)
    if source.kind == "callable":
        return call(source.name)
    params, external = study.archs[cell.arch], study.models.get(cell.method)
    if external is not None and external.mean is not None:
        changed = params.model_dump() | {"mean": external.mean, "std": external.std}
        params = type(params).model_validate(changed)
    return models.build(study.base("arch", cell.arch), params, image_shape, classes)


def with_weights(
    study: Study,
    cell: Cell,
    splits: Splits,
    path: Path | None,
    match: Match = "names",
) -> nn.Module:
    """The network of a cell with the weights of a file, or with those it is built with.

    Raises UsageError when the file is missing, damaged or does not fit, or foreign code fails.
    """
    network = build(study, cell, splits.image_shape, splits.classes)
    if path is not None:
        weights.load_into(network, path, match)
    return network


def call(source: str) -> nn.Module:
    """The network that a function returns, named as module:function, in eval mode, on the CPU.

    The module is found as Python would find it from the current folder; it runs with all rights of
    the user. Raises UsageError when it cannot be imported, fails or returns something else.
    """
    module, _, name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module), name)()
        if isinstance(network, nn.Module):
            network.eval().cpu()
    except (Exception, SystemExit) as error:  # whatever the user's own code meets
        raise UsageError(f"{source}: {in_a_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{source}: expected it to return a torch module, found {type(network).__name__}"
        )
    return network


def checked(network: nn.Module, images_NCHW: Tensor, classes: int) -> nn.Module:
    """The network, if it maps images to one number for each class, and can be differentiated.

    Args:
        network: any torch module, in eval mode.
        images_NCHW: two images or more, in [0,1], on the network's device.
        classes: of the data set.

    Raises UsageError otherwise, and when the network cannot be put into eval mode.
    """
    for n in (2, 1):  # the last batch of an attack may hold a single image
        x = images_NCHW[:n].clone().requires_grad_(True)
        try:
            with torch.enable_grad(), perturb.no_parameter_gradients(network):
                logits = network(x)
        except (Exception, SystemExit) as error:  # whatever a network's own code meets
            raise UsageError(
                f"network: fails on {n} images of shape {tuple(x.shape[1:])} ({in_a_line(error)})"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (n, classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(
                f"network: {n} images give {found}, expected logits {(n, classes)}; the data set "
                f"has {classes} classes"
            )
        if not logits.requires_grad:
            raise UsageError(
                "network: its outputs have no gradient with respect to the images, expected a "
                "torch module that can be differentiated"
            )
    training = [name or "itself" for name, part in network.named_modules() if part.training]
    if training:
        raise UsageError(f"network: {training[0]} stays in train mode, expected eval mode")
    return network
