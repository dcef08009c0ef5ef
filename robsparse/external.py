"""Takes a network that was trained elsewhere into a study, in place of training it."""

from robsparse import datasets, networks, records, weights
from robsparse.cells import Cell, Layout
from robsparse.connections import no_lifetimes, no_steps
from robsparse.sparsity import plain_state
from robsparse.staleness import training_digest
from robsparse.study import Study


def take_in(study: Study, cell: Cell, layout: Layout) -> None:
    """Write the files that training would: the same weights for both selections, no cost.

    Raises UsageError when the file is damaged, wants to run code or does not fit the arch.
    """
    source = study.source(cell.method)
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    network = networks.with_weights(study, cell, splits, source.file, source.match)
    state = plain_state(network)
    for selection in ("best_val", "last"):
        weights.save(layout.model(cell, selection), state)
    tables = {layout.steps(cell): no_steps(), layout.lifetimes(cell): no_lifetimes()}
    for path, table in tables.items():
        with records.atomic(path) as temporary:
            table.to_parquet(temporary)
    record = {
        "cell": cell.key,
        "settings": study.training_settings(cell),
        "settings_digest": training_digest(study, cell),
        "selected": {"best_val": {"epoch": None}, "last": {"epoch": None}},
        "failure": "",
        "cost": None,
        "curve": [],
        "data_checksum": splits.checksum(),
        **records.provenance(),
    }
    records.write_json(layout.training(cell), record)
    print(f"taken in {cell.key}: {layout.model(cell, 'last').parent}")
