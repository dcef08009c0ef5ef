"""Imports an external model into a study; this replaces its training.

The import stores the weights like those of a trained network. If foreign code builds the network,
each evaluation builds it again, loads the imported weights and checks on a few images that its
outputs have not changed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from robsparse import datasets
from robsparse.base.errors import UsageError, one_line
from robsparse.base.files import file_checksum, write_parquet, write_record
from robsparse.datasets import Splits
from robsparse.networks import construct, weights
from robsparse.records import provenance
from robsparse.records.training_record import check_weights, read_training
from robsparse.sparsity.history import empty_lifetimes, empty_steps
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

IMAGES = 4  # number of images on which outputs are compared
TOLERANCE = 1e-3  # relative to the largest logit; rounding differs between machines


def import_network(study: Study, cell: Cell, layout: Layout) -> None:
    """Write the files that training would write, with the weights of the external model.

    All selections get the same weights. The record has no cost of training.

    Raises:
        UsageError: if the file is damaged, would run code or does not fit the arch, or if the
            network does not map images of the data set to logits.
    """
    fingerprint = fingerprints.training(study, cell)
    source = study.source(cell.method)
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    network = construct.with_weights(study, cell, splits, source.file, source.match).eval()
    construct.check_network(network, splits.some_images(IMAGES), splits.classes)
    state = _tensors(network, str(source))
    selections = study.saved_selections()
    for selection in selections:
        weights.save(layout.model(cell, selection), state)
    tables = {layout.steps(cell): empty_steps(), layout.lifetimes(cell): empty_lifetimes()}
    for path, table in tables.items():
        write_parquet(path, table)
    record = {
        "cell": cell.key,
        "selected": {s: {"epoch": None} for s in selections},
        "failure": "",
        "cost": None,
        "curve": [],
        "imported": _identity(network, splits) if source.foreign else None,
        "data_checksum": splits.checksum(),
        **provenance.current(),
        **fingerprint.as_record(),
        "weights": {s: file_checksum(layout.model(cell, s)) for s in selections},
        "tables": {path.name: file_checksum(path) for path in tables},
    }
    write_record(layout.training(cell), record)
    print(f"imported {cell.key}: {layout.model(cell, 'last').parent}")


def load_network(
    study: Study, cell: Cell, splits: Splits, layout: Layout, selection: str
) -> tuple[nn.Module, str]:
    """Return the trained or imported network of a cell, and a text that says where it comes from.

    Args:
        study: the resolved study.
        cell: the cell of the study.
        splits: the data set of the cell.
        layout: paths of the study's results.
        selection: which saved weights.

    Raises:
        UsageError: if the weights are missing or damaged, or if foreign code builds a network with
            other outputs than at its import.
    """
    source, path = study.source(cell.method), layout.model(cell, selection)
    if not source.foreign:
        try:
            network = construct.with_weights(study, cell, splits, path)
        except UsageError as error:
            raise UsageError(f"{error}; train this network again") from None
        check_weights(layout.training(cell), selection, path)
        return network, str(source)
    again = f"train --cell {cell.key} imports it"
    before = read_training(layout.training(cell)).get("imported")
    if before is None:
        raise UsageError(f"{path}: not the weights of {source}; {again}")
    network = construct.with_weights(study, cell, splits, None)
    built = weights.checksum(network.state_dict())
    weights.load_into(network, path)
    check_weights(layout.training(cell), selection, path)
    construct.check_network(network.eval(), splits.some_images(IMAGES), splits.classes)
    found = _outputs(network, splits)
    if before["outputs"] is not None and not _nearly_equal(found, torch.tensor(before["outputs"])):
        raise UsageError(
            f"{source}: with the imported weights ({path}) its outputs are not those at its "
            "import, expected a network whose outputs depend only on images and state dict; "
            f"{again} again"
        )
    if built == before["built"]:
        return network, str(source)
    return network, f"{source}, builds other weights each time: the imported weights are attacked"


def _tensors(network: nn.Module, source: str) -> dict[str, Tensor]:
    """Return the state dict on the CPU. Raises UsageError if NumPy cannot store an entry."""
    state = {}
    for name, value in network.state_dict().items():
        try:
            # NumPy has no bfloat16; float32 holds its values exactly.
            plain = value.float() if value.dtype is torch.bfloat16 else value
            state[name] = plain.detach().cpu().clone()
            state[name].numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"{source}: '{name}' of its state dict cannot be stored ({one_line(error)}), "
                "expected ordinary tensors"
            ) from None
    return state


def _identity(network: nn.Module, splits: Splits) -> dict[str, Any]:
    """Return a checksum of the weights and some outputs; a later build is compared with them."""
    outputs = _outputs(network, splits)
    # Outputs that differ between two passes, e.g. of a random network, cannot be compared.
    same = bool(outputs.isfinite().all()) and _nearly_equal(outputs, _outputs(network, splits))
    return {
        "built": weights.checksum(network.state_dict()),
        "outputs": outputs.tolist() if same else None,
    }


def _outputs(network: nn.Module, splits: Splits) -> Tensor:
    """Return the logits of the first training images; torch's generator has a fixed seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return network(splits.some_images(IMAGES).clone()).float()


def _nearly_equal(one: Tensor, other: Tensor) -> bool:
    """Return whether logits are equal within the tolerance."""
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
