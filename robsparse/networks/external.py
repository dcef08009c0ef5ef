"""Takes a network that was trained elsewhere into a study, in place of training it.

Its weights are kept as those of a trained network are. Foreign code builds its network anew for
every evaluation and gets the weights that were taken in; that it then computes what it did is
checked on a few images.
"""

from typing import Any

import torch
from torch import Tensor, nn

from robsparse import datasets
from robsparse.base.errors import UsageError, in_a_line
from robsparse.base.files import atomic, file_checksum, read_json, write_json
from robsparse.datasets import Splits
from robsparse.networks import construct, weights
from robsparse.records import provenance
from robsparse.sparsity.history import empty_lifetimes, empty_steps
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

IMAGES = 4  # training images on which the outputs are compared
TOLERANCE = 1e-3  # of the largest logit; another machine rounds otherwise


def take_in(study: Study, cell: Cell, layout: Layout) -> None:
    """Write the files that training would: the same weights for both selections, no cost.

    Raises UsageError when the file is damaged, wants to run code or does not fit the arch, and when
    the network does not map images of the data set to logits.
    """
    fingerprint = fingerprints.training(study, cell)
    source = study.source(cell.method)
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    network = construct.with_weights(study, cell, splits, source.file, source.match).eval()
    construct.checked(network, splits.train.x_NCHW[:IMAGES], splits.classes)
    state = _tensors(network, str(source))
    for selection in ("best_val", "last"):
        weights.save(layout.model(cell, selection), state)
    tables = {layout.steps(cell): empty_steps(), layout.lifetimes(cell): empty_lifetimes()}
    for path, table in tables.items():
        with atomic(path) as temporary:
            table.to_parquet(temporary)
    record = {
        "cell": cell.key,
        "selected": {"best_val": {"epoch": None}, "last": {"epoch": None}},
        "failure": "",
        "cost": None,
        "curve": [],
        "taken_in": _print_of(network, splits) if source.foreign else None,
        "data_checksum": splits.checksum(),
        **provenance.current(),
        **fingerprint.kept(),
        "weights": {s: file_checksum(layout.model(cell, s)) for s in ("best_val", "last")},
    }
    write_json(layout.training(cell), record)
    print(f"taken in {cell.key}: {layout.model(cell, 'last').parent}")


def opened(
    study: Study, cell: Cell, splits: Splits, layout: Layout, selection: str
) -> tuple[nn.Module, str]:
    """The network of a cell with its weights of a study, and where it comes from, in words.

    Raises UsageError when weights are missing or damaged, and when a network of foreign code does
    not compute with them what it did when it was taken in.
    """
    source, path = study.source(cell.method), layout.model(cell, selection)
    if not source.foreign:
        return construct.with_weights(study, cell, splits, path), str(source)
    again = f"train --cell {cell.key} takes it in"
    before = read_json(layout.training(cell)).get("taken_in")
    if before is None:
        raise UsageError(f"{path}: not the weights of {source}; {again}")
    network = construct.with_weights(study, cell, splits, None)
    built = weights.checksum(network.state_dict())
    weights.load_into(network, path)
    construct.checked(network.eval(), splits.train.x_NCHW[:IMAGES], splits.classes)
    found = _outputs(network, splits)
    if before["outputs"] is not None and not _alike(found, torch.tensor(before["outputs"])):
        raise UsageError(
            f"{source}: with the weights that were taken in ({path}) it does not compute what it "
            f"did then, expected a network that its state dict decides; {again} again"
        )
    if built == before["built"]:
        return network, str(source)
    return network, f"{source}, built with other weights each time: those taken in are attacked"


def _tensors(network: nn.Module, source: str) -> dict[str, Tensor]:
    """The state dict as it can be stored. Raises UsageError if it holds more than tensors."""
    state = {}
    for name, value in network.state_dict().items():
        try:
            # NumPy has no bfloat16; float32 holds its values exactly.
            plain = value.float() if value.dtype is torch.bfloat16 else value
            state[name] = plain.detach().cpu().clone()
            state[name].numpy()
        except (AttributeError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"{source}: '{name}' of its state dict cannot be stored ({in_a_line(error)}), "
                "expected ordinary tensors"
            ) from None
    return state


def _print_of(network: nn.Module, splits: Splits) -> dict[str, Any]:
    """What tells whether a later build is the same network."""
    outputs = _outputs(network, splits)
    # What differs from pass to pass, by randomness of its own, cannot be compared.
    same = bool(outputs.isfinite().all()) and _alike(outputs, _outputs(network, splits))
    return {
        "built": weights.checksum(network.state_dict()),
        "outputs": outputs.tolist() if same else None,
    }


def _outputs(network: nn.Module, splits: Splits) -> Tensor:
    """Logits of the first training images, with torch's generator in one state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return network(splits.train.x_NCHW[:IMAGES].clone()).float()


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether logits are the same to rounding."""
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())
