"""Writes a result as an entry of RobustBench, and copies the weights beside it."""

import shutil
from pathlib import Path

from robsparse.base.counts import keep_count
from robsparse.base.errors import UsageError
from robsparse.base.files import atomic, read_tensors, write_json
from robsparse.figures.text.formats import radius
from robsparse.records.evaluation_record import read_record
from robsparse.schema.evaluation import Selection
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study


def model_info(study: Study, cell: Cell, selection: Selection, layout: Layout) -> Path:
    """Write the model_info of an attacked network; return its path.

    link, name, authors and venue are null; fill them in before you submit the entry.

    Raises:
        UsageError: if the network was not attacked with the complete standard AutoAttack.
    """
    record = read_record(layout.evaluation(cell, selection))
    whole = {row.attack: row for row in record.rows if row.component == "all"}
    if "autoattack" not in whole:
        raise UsageError(
            f"{layout.evaluation(cell, selection)}: RobustBench expects an AutoAttack accuracy"
        )
    row = whole["autoattack"]
    if row.version != "standard":
        raise UsageError(
            f"{layout.evaluation(cell, selection)}: AutoAttack version = {row.version}: expected "
            "standard, which RobustBench's accuracies are of"
        )
    label = study.label("method", cell.method)
    path = layout.root / "export" / cell.key / f"{selection}.model_info.json"
    write_json(
        path,
        {
            "link": None,
            "name": None,
            "authors": None,
            "additional_data": cell.objective == "rst",
            "number_forward_passes": 1,
            "dataset": study.base("dataset", cell.dataset),
            "venue": None,
            "architecture": study.label("arch", cell.arch),
            "eps": radius(row.eps),
            "clean_acc": _percent(whole["clean"].accuracy),
            "reported": _percent(row.accuracy),
            "autoattack_acc": _percent(row.accuracy),
            "unreliable": bool(row.potentially_unreliable),
            "footnote": f"{label}, sparsity {row.sparsity_reached:.4f} ({row.nonzero} of "
            f"{row.prunable} weights, {keep_count(row.prunable, cell.sparsity)} asked), "
            f"objective {cell.objective}, seed {cell.seed}, selection {selection}, first "
            f"{row.n_examples} test images, robsparse {row.code_version}",
        },
    )
    return path


def copy_weights(cell: Cell, selection: Selection, layout: Layout) -> Path:
    """Copy a network's weights (safetensors) to the folder of its model_info; return the path.

    Raises:
        UsageError: if an older version of robsparse wrote the weights.
    """
    weights = layout.model(cell, selection)
    read_tensors(weights)
    path = layout.root / "export" / cell.key / f"{selection}.safetensors"
    with atomic(path) as temporary:
        shutil.copyfile(weights, temporary)
    return path


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
