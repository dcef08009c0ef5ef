"""Reads the collected results of a study."""

from pathlib import Path

import pandas as pd

from robsparse.figures.data.tidy import read


def read_results(folder: str | Path) -> pd.DataFrame:
    """Return the rows of a study, e.g. of "results/quick": one measured accuracy in each row.

    The columns are the fields of `robsparse.records.rows.Row` and those that `robsparse collect`
    adds (docs/evaluation.md). Accuracies and sparsities are fractions in [0,1].

    Raises:
        UsageError: if the study is not collected yet, or if its table is damaged.
    """
    return read(Path(folder)).results
