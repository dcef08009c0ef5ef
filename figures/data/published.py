"""Published accuracies: reads and checks the files results/reference/*.csv.

Import path: robsparse.figures.data.published
"""

from pathlib import Path

import pandas as pd

from robsparse.base.errors import UsageError, nearest_match
from robsparse.schema.evaluation import Selection
from robsparse.schema.fields import rounded_sparsity

KEYS = ["dataset", "arch", "method", "objective", "sparsity", "attack", "selection"]
COLUMNS = [
    *KEYS,
    "accuracy",
    "eps",
    "n_examples",
    "extra_data",
    "where",
    "printed_as",
    "note",
]
# The epoch of a published number: not stated, the best one on some images, or the last one.
SELECTIONS = ("", "best", "last")


def read(path: Path) -> pd.DataFrame:
    """Read a file of published numbers, and add the column `source` (the name of the file).

    Lines that start with # are comments. `accuracy` is a fraction in [0,1]. An empty cell is
    unknown; an empty objective matches every objective. `selection` is one of SELECTIONS.

    Raises:
        UsageError: if a value is wrong. The message names file, row, column and value.
    """
    try:
        table = pd.read_csv(path, comment="#", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot read published numbers ({error})") from None
    for column in table.columns:
        if column not in COLUMNS:
            raise UsageError(f"{path}: unknown column '{column}'{nearest_match(column, COLUMNS)}")
    for column in COLUMNS:
        if column not in table:
            raise UsageError(f"{path}: no column '{column}'")
    for column, low, high in (("accuracy", 0, 1), ("sparsity", 0, 1), ("eps", 0, 1)):
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = ~numbers.between(low, high) & ~((table[column] == "") & (column == "eps"))
        for row in table.index[wrong]:
            raise UsageError(
                f"{path}: row {row + 1}: {column} = '{table[column][row]}': expected a number in "
                f"[{low}, {high}]"
            )
        table[column] = numbers
    for row in table.index[~table.selection.isin(SELECTIONS)]:
        raise UsageError(
            f"{path}: row {row + 1}: selection = '{table.selection[row]}': expected 'best', 'last' "
            "or an empty field"
        )
    return table.assign(sparsity=table.sparsity.map(rounded_sparsity), source=path.stem)


def chosen_alike(theirs: pd.DataFrame, selection: Selection) -> pd.Series:
    """Return whether each published number may be compared with our selection (bool).

    `last` is compared with numbers of the last epoch. The other selections are compared with
    numbers of the best epoch, although the authors chose that epoch on other images, often the test
    images. Numbers without a stated epoch are compared with every selection.
    """
    return theirs.selection.isin(["", "last" if selection == "last" else "best"])
