"""Returns the network of a cell: built from an arch, loaded from a zoo, or made by a function."""

import importlib
import sys
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from robsparse import models
from robsparse.base.errors import UsageError, one_line
from robsparse.compute import perturb
from robsparse.datasets import Splits
from robsparse.networks import weights
from robsparse.schema.external import Match
from robsparse.study.cells import Cell
from robsparse.study.study import Study
from robsparse.thirdparty import zoo


def build(study: Study, cell: Cell, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the network of a cell with initial weights.

    An external model of a zoo or of a function keeps its own weights. Initial weights are drawn
    from torch's global generator; seed it first.

    Args:
        study: the resolved study.
        cell: the cell of the study.
        image_shape: channels, height and width of the images.
        classes: number of logits.
    """
    source = study.source(cell.method)
    if source.kind == "zoo":
        return zoo.load(source.name, study.base("dataset", cell.dataset), study.threat.norm)
    if source.kind == "callable":
        return call(source.name)
    params = arch_params(study, cell)
    return models.build(study.base("arch", cell.arch), params, image_shape, classes)


def arch_params(study: Study, cell: Cell) -> BaseModel:
    """Return the parameters of the arch of a cell; an external model may normalise its images."""
    params, external = study.archs[cell.arch], study.models.get(cell.method)
    if external is None or external.mean is None:
        return params
    changed = params.model_dump() | {"mean": external.mean, "std": external.std}
    return type(params).model_validate(changed)


def with_weights(
    study: Study,
    cell: Cell,
    splits: Splits,
    path: Path | None,
    match: Match = "names",
) -> nn.Module:
    """Return the network of a cell with the weights of a file.

    Args:
        study: the resolved study.
        cell: the cell of the study.
        splits: the data set of the cell.
        path: the file; None keeps the weights that the network is built with.
        match: how tensors of the file are matched, see `weights.load_into`.

    Raises:
        UsageError: if the file is missing or damaged or does not fit, or if foreign code fails.
    """
    network = build(study, cell, splits.image_shape, splits.classes)
    if path is not None:
        weights.load_into(network, path, match)
    return network


def call(source: str) -> nn.Module:
    """Call a user's function and return its network in eval mode on the CPU.

    Args:
        source: module:function. Python imports the module from the current folder or from its
            installed packages. The code runs with all rights of the user.

    Raises:
        UsageError: if the import or the call fails, or if the result is no torch module.
    """
    module, _, name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module), name)()
        if isinstance(network, nn.Module):
            network.eval().cpu()
    except (Exception, SystemExit) as error:  # the user's code can raise anything
        raise UsageError(f"{source}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{source}: expected a function that returns a torch module, found "
            f"{type(network).__name__}"
        )
    return network


def check_network(network: nn.Module, images_NCHW: Tensor, classes: int) -> nn.Module:
    """Check that a network maps images to differentiable logits_NK, and return it.

    Args:
        network: any torch module, in eval mode.
        images_NCHW: at least two images in [0,1], on the network's device.
        classes: number of classes K of the data set.

    Raises:
        UsageError: if the network fails, if its outputs have another shape or no gradient, or if a
            part of it stays in train mode.
    """
    for n in (2, 1):  # the last batch of an attack may hold a single image
        x = images_NCHW[:n].clone().requires_grad_(True)
        try:
            with torch.enable_grad(), perturb.no_parameter_gradients(network):
                logits = network(x)
        except (Exception, SystemExit) as error:  # the network's code can raise anything
            raise UsageError(
                f"network: fails on {n} images of shape {tuple(x.shape[1:])} ({one_line(error)})"
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
