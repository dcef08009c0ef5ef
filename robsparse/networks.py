"""From a cell to its network: built from an arch, fetched from a zoo, or made by a function."""

import importlib
import sys
from pathlib import Path

from torch import nn

from robsparse import models, weights
from robsparse.cells import Cell
from robsparse.datasets import Splits
from robsparse.errors import UsageError
from robsparse.sources import Match
from robsparse.study import Study
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
    """The network that a function returns, named as module:function.

    The module is found as Python would find it from the current folder; it runs with all rights of
    the user. Raises UsageError when it cannot be imported, fails or returns something else.
    """
    module, _, name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        network = getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever the user's own code meets
        raise UsageError(f"{source}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{source}: expected it to return a torch module, found {type(network).__name__}"
        )
    return network.eval()
