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
    attacked: dict[tuple[Any, ...], list[Any]] = {}
    for row in results[results.component == "all"].itertuples():
        place = tuple(getattr(row, name) for name in (*NETWORK_KEY, "norm", "eps"))
        attacked.setdefault(place, []).append(row)
    reasons: dict[tuple[Any, ...], str] = {}
    for place, rows in attacked.items():
        ours = next((row for row in rows if row.attack == "autoattack"), None)
        strongest = min(rows, key=lambda row: row.n_correct)
        if ours is not None and strongest.n_correct < ours.n_correct:
            excess = int(ours.n_correct - strongest.n_correct)
            name = "AutoAttack" if ours.version == "standard" else f"AutoAttack ({ours.version})"
            reasons[place[:-2]] = f"{strongest.attack} breaks {excess} more images than {name}"
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
    for row in results[results.duplicated(KEY)].itertuples():
        found.append(f"{_name(row)}: two rows have this key")
    clean = results[results.attack == "clean"].set_index(NETWORK_KEY).n_correct.to_dict()
    for row in results.itertuples():
        found += [f"{_name(row)}: {wrong}" for wrong in _contradictions_of_row(row, clean)]
    for column in ("data_checksum", "n_examples"):
        for dataset, values in results.groupby("dataset")[column].unique().items():
            if len(values) > 1:
                texts = sorted(map(str, values))
                found.append(f"{dataset}: {column} differs between rows: {texts}")
    return found


def _contradictions_of_row(row: Any, clean: dict[tuple[Any, ...], int]) -> list[str]:
    """All contradictions in one row, which has the columns as attributes.

    clean: for each network, the number of images that it classifies correctly without an attack.
    """
    found = []
    if abs(row.accuracy - row.n_correct / row.n_examples) > _TOLERANCE:
        found.append(f"accuracy {row.accuracy} is not {row.n_correct}/{row.n_examples}")
    if not row.ci_low - _TOLERANCE <= row.accuracy <= row.ci_high + _TOLERANCE:
        found.append(f"accuracy {row.accuracy} is outside its interval")
    most = clean.get(tuple(getattr(row, name) for name in NETWORK_KEY))
    if most is None:
        found.append("no clean accuracy of this network")
    elif row.n_correct > most:
        found.append(f"{row.n_correct} correct under attack, but {most} without attack")
    if pd.notna(row.max_perturbation) and row.max_perturbation > row.eps + _TOLERANCE:
        found.append(f"perturbation {row.max_perturbation} is larger than eps {row.eps}")
    if row.nan_count:
        found.append(f"{row.nan_count} NaN values in adversarial images")
    return found


def _name(row: Any) -> str:
    return "/".join(str(getattr(row, name)) for name in KEY)
