"""One random-effects model for every interval and every test: seeds crossed with test images.

Every network is attacked on the same images, so an outcome varies with the seed, with the image,
and with the two together. A mean over S seeds and N images then has the variance V_seeds +
V_images:

    V_seeds = (sample variance of the S means over images) / S
    V_images = (variance of the images' own share) / N, from the mean squares of a two-way layout

V_seeds is the variance between seeds, with the interaction, and has S - 1 degrees of freedom.
V_images is the variance that all seeds have in common. Howe's rule combines the two:

    half-width = sqrt(t(S-1)^2 V_seeds + t(N-1)^2 V_images).

An interval is therefore never narrower than the t interval of the seeds' means. A p-value is the
level at which the interval just reaches zero, so interval and p-value never contradict each other.
Satterthwaite's rule, which multi-reader studies use (Hillis 2007), was tried first. With two seeds
its rate of false rejections is up to three times the nominal level (docs/statistics.md).

With one seed the variance between seeds is unknown: intervals are over images only, and there is no
p-value.

Sources: Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4 (two-way crossed,
random); Howe, JASA 69 (1974), 789-794; Zou and Donner, Statistics in Medicine 27 (2008), for limits
that are not symmetric; Wilson, JASA 22 (1927).

Import path: robsparse.figures.data.statistics
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student

LEVEL = 0.95
POWER = 0.8
_LEAST_P = 1e-15


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1); nan if there are too few values."""
    numbers = np.asarray(values, dtype=float)
    mean = float(numbers.mean()) if len(numbers) else float("nan")
    return mean, float(numbers.std(ddof=1)) if len(numbers) > 1 else float("nan")


def variances(outcomes_SN: np.ndarray) -> tuple[float, float]:
    """Return the parts of the variance of the mean: (V_seeds, V_images).

    Args:
        outcomes_SN: outcome of each image for each seed: 0 or 1, or -1, 0 or 1 for the difference
            of two networks.

    Returns:
        V_seeds, which is nan with one seed; V_images, which is 0 with one image or if its estimate
        is negative.

    Raises:
        ValueError: if there is no seed or no image.
    """
    if outcomes_SN.ndim != 2 or not outcomes_SN.size:
        raise ValueError(f"expected outcomes of shape (seeds, images), got {outcomes_SN.shape}")
    (seeds, images), values = outcomes_SN.shape, outcomes_SN.astype(float)
    by_seed, by_image, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    square_images = seeds * float(((by_image - mean) ** 2).sum()) / max(images - 1, 1)
    if seeds == 1:
        return math.nan, square_images / images
    rest = values - by_seed[:, None] - by_image + mean
    square_rest = float((rest**2).sum()) / ((seeds - 1) * max(images - 1, 1))
    of_images = max(square_images - square_rest, 0.0) / (seeds * images)
    return float(by_seed.var(ddof=1)) / seeds, of_images


@dataclass(frozen=True)
class Difference:
    """Mean of outcomes paired by seed and image, and the parts of its variance.

    of_seeds, of_images: the parts of its variance, see `variances`; of_seeds is nan for one seed.
    freedom: degrees of freedom of of_seeds if it is estimated from several means; None: seeds - 1.
    """

    mean: float
    seeds: int
    images: int
    of_seeds: float
    of_images: float
    freedom: int | None = None

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Low and high end, in [-1, 1]. With one seed, the interval is over images only."""
        half = self._reach(1 - level)
        return max(-1.0, self.mean - half), min(1.0, self.mean + half)

    @property
    def p(self) -> float:
        """Two-sided p-value of "no difference"; nan with one seed.

        It is below 0.05 if and only if the 95 % interval does not contain zero. It is at least
        1e-15.
        """
        if self.seeds == 1:
            return math.nan
        if not self.mean:
            return 1.0
        if self._reach(_LEAST_P) < abs(self.mean):
            return _LEAST_P
        return float(brentq(lambda p: self._reach(p) - abs(self.mean), _LEAST_P, 1.0, xtol=1e-15))

    @property
    def detectable(self) -> float:
        """The true difference that has p < 0.05 with probability 0.8; nan with one seed."""
        return math.nan if self.seeds == 1 else self._reach(1 - LEVEL, POWER)

    def _reach(self, p: float, power: float | None = None) -> float:
        """The mean that has this p-value; with `power`, the true mean that is found with it."""
        parts = [(self.of_images, max(self.images - 1, 1))]
        if self.seeds > 1:
            parts.append((self.of_seeds, self.freedom or self.seeds - 1))
        found = 0.0
        for variance, freedom in parts:
            steps = _quantile(p / 2, freedom) + (_quantile(1 - power, freedom) if power else 0)
            found += steps**2 * variance
        return math.sqrt(found)


def difference(ours_SN: np.ndarray, theirs_SN: np.ndarray) -> Difference:
    """Our accuracy minus theirs, paired by seed and image.

    V_images is at least its value for S·N independent outcomes. It is also at least 1/N², the value
    for one more image with different outcomes. So an interval over few images is never too narrow.

    Args:
        ours_SN: bool, outcome of each image for each seed.
        theirs_SN: the same for the other method, with the same seeds and images.

    Raises:
        ValueError: if the shapes differ, or there is no seed or no image.
    """
    if ours_SN.shape != theirs_SN.shape:
        raise ValueError(f"expected equal shapes, got {ours_SN.shape} and {theirs_SN.shape}")
    apart_SN = ours_SN.astype(int) - theirs_SN.astype(int)
    of_seeds, of_images = variances(apart_SN)
    seeds, images = apart_SN.shape
    least = max(float(apart_SN.var()) / apart_SN.size, 1 / images**2)
    return Difference(float(apart_SN.mean()), seeds, images, of_seeds, max(of_images, least))


def accuracy_interval(outcomes_SN: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Interval of an accuracy: low and high end in [0, 1]. With one seed, over images only.

    For images it uses Wilson's interval with an effective number of images: N if all seeds agree on
    every image, and S·N if outcomes of different seeds are independent. The width of this interval
    is never zero. The variance of seeds is added by Zou and Donner's rule, which is Howe's rule for
    limits that are not symmetric.

    Args:
        outcomes_SN: bool, outcome of each image for each seed.
        level: probability that the interval contains the true accuracy.

    Raises:
        ValueError: if there is no seed or no image.
    """
    of_seeds, of_images = variances(outcomes_SN)
    (seeds, images), mean = outcomes_SN.shape, float(outcomes_SN.mean())
    binomial = mean * (1 - mean)
    shared = min(max(of_images * images / binomial, 1 / seeds), 1.0) if binomial else 1.0
    step = _quantile((1 - level) / 2, max(images - 1, 1)) ** 2 * shared / images
    centre = (mean + step / 2) / (1 + step)
    half = math.sqrt(step * binomial + step**2 / 4) / (1 + step)
    other = _quantile((1 - level) / 2, seeds - 1) ** 2 * of_seeds if seeds > 1 else 0.0
    low = mean - math.sqrt((mean - centre + half) ** 2 + other)
    high = mean + math.sqrt((centre + half - mean) ** 2 + other)
    return max(0.0, low), min(1.0, high)


@functools.lru_cache(maxsize=1024)
def _quantile(tail: float, freedom: int) -> float:
    """The value that Student's t exceeds with probability `tail`."""
    return float(student.isf(tail, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests; nan stays nan and is not counted as a test.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not np.isnan(p))
    found, highest = [float("nan")] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        found[i] = highest
    return found


def survival_curve(
    age: Sequence[int], pruned: Sequence[int], active: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of connections that stay active longer than each age.

    Args:
        age: ages in steps; an age may occur several times (several networks).
        pruned: how many were pruned at that age.
        active: how many had that age at the end of training; their lifetime is censored.

    Returns:
        Ages from 0 to the largest (A values) and shares (A values); the estimate accounts for
        censored lifetimes.

    Source: Kaplan and Meier, JASA 53 (1958), equation 2b.
    """
    ages = np.asarray(age, dtype=int)
    ended = np.bincount(ages, weights=np.asarray(pruned, dtype=float))
    censored = np.bincount(ages, weights=np.asarray(active, dtype=float))
    gone = ended + censored
    at_risk = gone[::-1].cumsum()[::-1]
    return np.arange(len(ended)), np.cumprod(1 - ended / np.maximum(at_risk, 1))
