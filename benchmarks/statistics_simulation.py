"""Simulates whether intervals and tests of robsparse.figures.data.statistics keep their level.

    python benchmarks/statistics_simulation.py --replications 1000

Two methods are trained with S seeds and attacked on the same N images. An image withstands a
network where a normal variable is positive, which is the sum of the method's level, what the seed
adds to it, how hard the image is (partly for both methods, partly for one of them), and what is
left for this network and image. The truth is known, so it can be counted how often an interval
holds it, and how often a test says that two equally good methods differ. KINDS says what seeds do.

The constants resemble the study config/quick_all.yaml; see docs/statistics.md.
"""

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2, norm
from scipy.stats import t as student

from robsparse.figures.data import statistics

OLDER = 5  # of so many replications one is looked at by the bootstrap, too
GUESSING = 0.1  # accuracy of a network whose training collapsed


@dataclass(frozen=True)
class Kind:
    """What seeds and images do.

    spread: standard deviation of the level over seeds, in units of an image's variable.
    collapsing: share of seeds whose training collapses.
    shared, own: shares of an image's variance 1: hard for both methods, hard for one of them.
    """

    spread: float
    collapsing: float = 0.0
    shared: float = 0.5
    own: float = 0.2

    def truth(self, usual: float) -> float:
        """The accuracy in the limit of many seeds, where that of one that trains is usual."""
        return (1 - self.collapsing) * usual + self.collapsing * GUESSING


KINDS = {
    "none": Kind(0.0, shared=0.92, own=0.03),
    "small": Kind(0.04, shared=0.92, own=0.03),
    "large": Kind(0.2),
    "collapse": Kind(0.05, 1 / 6),
}


def outcomes(
    rng: np.random.Generator, kind: Kind, usual: tuple[float, float], seeds: int, images: int
) -> list[np.ndarray]:
    """Outcomes (bool, S×N) of two methods; `usual`: their accuracies over seeds that train."""
    shared = np.sqrt(kind.shared) * rng.normal(size=images)
    found = []
    for share in usual:
        level = norm.ppf(share) * np.hypot(1, kind.spread) + kind.spread * rng.normal(
            size=(seeds, 1)
        )
        level[rng.random((seeds, 1)) < kind.collapsing] = norm.ppf(GUESSING)
        own = np.sqrt(kind.own) * rng.normal(size=images)
        rest = np.sqrt(1 - kind.shared - kind.own) * rng.normal(size=(seeds, images))
        found.append(level + shared + own + rest > 0)
    return found


def bootstrap(rng: np.random.Generator, values_SN: np.ndarray, draws: int = 400) -> np.ndarray:
    """The older interval: percentiles of means over drawn seeds and drawn images."""
    seeds, images = values_SN.shape
    codes_N = 3 ** np.arange(seeds) @ (values_SN + 1)
    _, first_P, counts_P = np.unique(codes_N, return_index=True, return_counts=True)
    patterns_SP = values_SN[:, first_P].astype(int)
    seeds_DS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    images_DP = rng.multinomial(images, counts_P / images, size=draws)
    means_D = ((seeds_DS @ patterns_SP) * images_DP).sum(axis=1) / (seeds * images)
    return np.percentile(means_D, [2.5, 97.5])


def mcnemar(apart_SN: np.ndarray) -> bool:
    """The older test, seeds taken as they are, at 5 % (Durkalski et al., 2003)."""
    sums_N = apart_SN.sum(axis=0)
    squares = float((sums_N**2).sum())
    return bool(squares) and float(sums_N.sum() ** 2 / squares) > chi2.ppf(0.95, 1)


def hillis(apart_SN: np.ndarray) -> bool:
    """Satterthwaite's degrees of freedom as in multi-reader studies (Hillis, 2007), at 5 %."""
    of_seeds, of_images = statistics.variances(apart_SN)
    total = of_seeds + of_images
    if not total or not of_seeds:
        return bool(apart_SN.mean()) and bool(total)
    freedom = (len(apart_SN) - 1) * (total / of_seeds) ** 2
    return abs(apart_SN.mean()) > student.ppf(0.975, freedom) * np.sqrt(total)


def once(
    rng: np.random.Generator, kind: Kind, usual: float, seeds: int, images: int, *, older: bool
) -> dict[str, float]:
    """One pair of equally good methods, and one of methods ten points apart: what is said.

    `older`: by the bootstrap, too, which takes most of the time.
    """
    truth, gap = kind.truth(usual), kind.truth(usual) - kind.truth(usual - 0.1)
    ours, theirs = outcomes(rng, kind, (usual, usual), seeds, images)
    equal = statistics.difference(ours, theirs)
    apart = ours.astype(int) - theirs
    better, worse = outcomes(rng, kind, (usual, usual - 0.1), seeds, images)
    unequal = statistics.difference(better, worse)
    least, most = unequal.interval()
    said = {
        "size": _leaves_out(equal.interval(), 0),
        "size_mcnemar": mcnemar(apart),
        "size_hillis": hillis(apart),
        "accuracy": not _leaves_out(statistics.accuracy_interval(ours), truth),
        "difference": not _leaves_out((least, most), gap),
        "width": (most - least) / 2,
        "power": _leaves_out((least, most), 0),
    }
    if older:
        said["accuracy_bootstrap"] = not _leaves_out(bootstrap(rng, ours), truth)
        said["difference_bootstrap"] = not _leaves_out(
            bootstrap(rng, better.astype(int) - worse), gap
        )
    return said


def _leaves_out(interval: tuple[float, float] | np.ndarray, value: float) -> bool:
    return not interval[0] <= value <= interval[1]


def simulate(
    replications: int,
    seed: int = 0,
    *,
    kinds: tuple[str, ...] = tuple(KINDS),
    seeds: tuple[int, ...] = (2, 3, 5, 10),
    images: tuple[int, ...] = (200, 1000),
    usual: tuple[float, ...] = (0.3, 0.6, 0.9),
) -> pd.DataFrame:
    """Shares over the replications (the median for `width`), a row a setting."""
    rows = []
    for kind, count, n, share in itertools.product(kinds, seeds, images, usual):
        rng = np.random.default_rng([seed, list(KINDS).index(kind), count, n, round(10 * share)])
        said = pd.DataFrame(
            [
                once(rng, KINDS[kind], share, count, n, older=i % OLDER == 0)
                for i in range(replications)
            ]
        )
        shares = said.astype(float).mean().to_dict() | {"width": said.width.median()}
        rows.append({"kind": kind, "seeds": count, "images": n, "usual": share} | shares)
    return pd.DataFrame(rows)


def in_words(found: pd.DataFrame) -> str:
    """A Markdown table, a row a kind and number of seeds; in brackets the worst of its settings."""
    lines = []
    for (kind, seeds), rows in found.groupby(["kind", "seeds"], sort=False):
        line = {"seeds differ": kind, "seeds": str(seeds)}
        for title, name, worst in _COLUMNS:
            line[title] = f"{100 * rows[name].mean():.1f}"
            line[title] += f" ({100 * getattr(rows[name], worst)():.1f})" if worst else ""
        lines.append(line)
    return pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)


_COLUMNS = [
    ("size", "size", "max"),
    ("McNemar's", "size_mcnemar", "max"),
    ("Hillis's", "size_hillis", "max"),
    ("accuracy held", "accuracy", "min"),
    ("bootstrap", "accuracy_bootstrap", "min"),
    ("difference held", "difference", "min"),
    ("bootstrap ", "difference_bootstrap", "min"),
    ("half-width", "width", ""),
    ("power", "power", ""),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", help="write every setting to this file")
    chosen = parser.parse_args()
    found = simulate(chosen.replications, chosen.seed)
    if chosen.csv:
        found.to_csv(chosen.csv, index=False)
    print(in_words(found))


if __name__ == "__main__":
    main()
