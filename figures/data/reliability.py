"""Grades the reasons why a network is potentially unreliable: fine, look, unreliable.

*Unreliable*: gradients tell an attack nothing (no gradient, random outputs, outputs that are not
numbers, images still correct at eps 1), or a stronger attack breaks more than 5 % of the attacked
images in addition. *Look*: a stronger attack breaks at most 5 % in addition, so that a printed
accuracy may be too high by about as much. *Fine*: no check found a reason.

Import path: robsparse.figures.data.reliability
"""

import re
from collections.abc import Iterable

FINE, LOOK, UNRELIABLE = "fine", "look", "unreliable"
GRADES = (FINE, LOOK, UNRELIABLE)  # from best to worst
LIMIT = 0.05  # share of the attacked images; the limit of the sanity check of gradients too

# Reasons with the number of images that a stronger attack breaks in addition. The texts are those
# of robsparse.evaluation.sanity_checks, robsparse.collection.plausibility, eval/autoattack.py and
# the package pyautoattack. A reason with another text is graded "unreliable".
_COUNTS = (
    r"Square broke (\d+) of the \d+ images",
    r"breaks (\d+) more images than AutoAttack",
    r"there are (\d+) points with zero gradient",
)
_SHARES = (
    r"random search breaks (\d+)% of the images",
    r"decreased the robust accuracy of ([\d.]+)%",
)
_CONVERGENCE = r"PGD has not converged: (\d+)% survive 50 steps, (\d+)% survive 200"


def grade_reason(reason: str, images: int) -> str:
    """Grade one reason.

    Args:
        reason: the text.
        images: number of attacked images.

    Returns:
        LOOK or UNRELIABLE.
    """
    return LOOK if _share(reason, images) <= LIMIT else UNRELIABLE


def _share(reason: str, images: int) -> float:
    """Share of images that a stronger attack breaks in addition; inf if the text gives none."""
    for pattern in _COUNTS:
        if found := re.search(pattern, reason):
            return int(found[1]) / images
    for pattern in _SHARES:
        if found := re.search(pattern, reason):
            return float(found[1]) / 100
    if found := re.search(_CONVERGENCE, reason):
        return (int(found[1]) - int(found[2])) / 100
    return float("inf")


def grade(reasons: str, images: int) -> str:
    """Grade all reasons of a network, separated by "; ": the worst grade; FINE without one."""
    return worst(grade_reason(reason, images) for reason in filter(None, reasons.split("; ")))


def worst(grades: Iterable[str]) -> str:
    """The worst of some grades; FINE if there is none."""
    return max(grades, key=GRADES.index, default=FINE)
