"""Accuracies on common corruptions with their intervals. The table and the plot show them.

Import path: robsparse.figures.data.corrupted
"""

import numpy as np
import pandas as pd

from robsparse.figures.data.statistics import accuracy_interval
from robsparse.figures.data.summary import Material
from robsparse.figures.data.tidy import Group
from robsparse.study.cells import Cell

MEAN = "mean"  # the corruption of the rows with the mean over all of them


def accuracies(material: Material, group: Group) -> pd.DataFrame:
    """Return the accuracy on each corruption in the primary selection, mean over severities.

    The interval is the one of an accuracy under attack (`accuracy_interval`): Wilson's for the
    images, and the variance of seeds. The outcome of an image is the share of severities (for
    `MEAN`: of corruptions and severities) at which it is correct. Its variance is at most that of
    an outcome that is 0 or 1. With one seed, Wilson's interval for this larger variance is used.

    Returns:
        One row for each method, sparsity and corruption; first `MEAN`. Columns: `accuracy`, `low`,
        `high` (fractions), `images`, `source`.
    """
    table = group.select(material.tidy.corruptions)
    table = table[table.selection == material.primary]
    found = []
    for (method, sparsity), own in table.groupby(["method", "sparsity"], sort=False):
        outcomes = _outcomes(material, own)
        for name in (MEAN, *own.corruption.unique()):
            chosen = outcomes if name == MEAN else outcomes[:, own.corruption.unique() == name]
            images_SN = chosen.mean(axis=1)
            low, high = accuracy_interval(images_SN)
            found.append(
                {"method": method, "sparsity": sparsity, "corruption": name}
                | {"accuracy": float(images_SN.mean()), "low": low, "high": high}
                | {"images": images_SN.shape[1], "source": own.source.iloc[0]}
            )
    names = "method sparsity corruption accuracy low high images source"
    return pd.DataFrame(found, columns=names.split())


def _outcomes(material: Material, rows: pd.DataFrame) -> np.ndarray:
    """Return the share of severities at which each image is correct (seeds x corruptions x N)."""
    seeds = []
    for seed, of_seed in rows.groupby("seed"):
        row = of_seed.iloc[0]
        cell = Cell(row.dataset, row.arch, row.method, row.objective, row.sparsity, int(str(seed)))
        seeds.append(
            [
                np.mean(
                    [
                        material.outcomes.corrupted(cell, row.selection, name, severity)
                        for severity in own.severity
                    ],
                    axis=0,
                )
                for name, own in of_seed.groupby("corruption", sort=False)
            ]
        )
    return np.array(seeds)
