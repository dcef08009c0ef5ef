"""Checks of all result rows of a study: weak attacks, missed budgets, contradictions."""

from typing import Any

import pandas as pd

from robsparse.base.counts import keep_count
from robsparse.collection.gather import NETWORK_KEY
from robsparse.records.rows import KEY

_TOLERANCE = 1e-6


def mark_weak_attacks(results: pd.DataFrame) -> pd.DataFrame:
    """Flag AutoAttack where another attack breaks more images, in `potentially_unreliable`.

    AutoAttack should be the strongest attack of its norm and eps. If another attack is stronger,
    the accuracy under AutoAttack is too high. Then every row of that network is flagged.
    """
    whole = results[results.component == "all"]
    reasons: dict[tuple[Any, ...], str] = {}
    for key, rows in whole.groupby([*NETWORK_KEY, "norm", "eps"], dropna=False):
        ours = rows[rows.attack == "autoattack"].n_correct
        excess = int(ours.iloc[0] - rows.n_correct.min()) if len(ours) else 0
        if excess > 0:
            strongest = rows.loc[rows.n_correct.idxmin(), "attack"]
            version = rows.loc[rows.attack == "autoattack", "version"].iloc[0]
            name = "AutoAttack" if version == "standard" else f"AutoAttack ({version})"
            reasons[key[:-2]] = f"{strongest} breaks {excess} more images than {name}"
    keys = zip(*(results[name] for name in NETWORK_KEY), strict=True)
    added = pd.Series([reasons.get(key, "") for key in keys], index=results.index, dtype=object)
    before = results.potentially_unreliable
    joined = (before.fillna("") + "; " + added).where(added != "", before).str.strip("; ")
    return results.assign(potentially_unreliable=joined)


def mark_missed_budgets(results: pd.DataFrame) -> pd.DataFrame:
    """Add the column `budget`: a text if the number of nonzero weights is not the requested one.

    With uniform layers, each layer may differ by one weight from rounding. A larger difference is
    marked.
    """
    asked = [keep_count(n, s) for n, s in zip(results.prunable, results.sparsity, strict=True)]
    missed = (results.nonzero - asked).abs() > results.layers
    texts = [
        f"{n:,} nonzero weights, {a:,} asked" for n, a in zip(results.nonzero, asked, strict=True)
    ]
    return results.assign(budget=pd.Series(texts, index=results.index).where(missed, ""))


def find_contradictions(results: pd.DataFrame) -> list[str]:
    """All contradictions in the rows, one line for each; a line starts with the key of the row."""
    found = []
    for _, row in results[results.duplicated(KEY)].iterrows():
        found.append(f"{_name(row)}: two rows have this key")
    clean = results[results.attack == "clean"].set_index(NETWORK_KEY).n_correct.to_dict()
    for _, row in results.iterrows():
        found += [f"{_name(row)}: {wrong}" for wrong in _contradictions_of_row(row, clean)]
    for column in ("data_checksum", "n_examples"):
        for dataset, values in results.groupby("dataset")[column].unique().items():
            if len(values) > 1:
                texts = sorted(map(str, values))
                found.append(f"{dataset}: {column} differs between rows: {texts}")
    return found


def _contradictions_of_row(row: pd.Series, clean: dict[tuple[Any, ...], int]) -> list[str]:
    """All contradictions in one row.

    clean: for each network, the number of images that it classifies correctly without an attack.
    """
    found = []
    if abs(row.accuracy - row.n_correct / row.n_examples) > _TOLERANCE:
        found.append(f"accuracy {row.accuracy} is not {row.n_correct}/{row.n_examples}")
    if not row.ci_low - _TOLERANCE <= row.accuracy <= row.ci_high + _TOLERANCE:
        found.append(f"accuracy {row.accuracy} is outside its interval")
    most = clean.get(tuple(row[NETWORK_KEY]))
    if most is None:
        found.append("no clean accuracy of this network")
    elif row.n_correct > most:
        found.append(f"{row.n_correct} correct under attack, but {most} without attack")
    if pd.notna(row.max_perturbation) and row.max_perturbation > row.eps + _TOLERANCE:
        found.append(f"perturbation {row.max_perturbation} is larger than eps {row.eps}")
    if row.nan_count:
        found.append(f"{row.nan_count} NaN values in adversarial images")
    return found


def _name(row: pd.Series) -> str:
    return "/".join(str(row[name]) for name in KEY)
