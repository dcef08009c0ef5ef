"""Values as text: percentages, radii, lists, and texts that several notes and captions use.

Import path: robsparse.figures.text.formats
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from robsparse.figures.data import reliability
from robsparse.figures.data.tidy import methods
from robsparse.study.study import Study

NONE = "n/a"
SMALL = "Small study: not comparable with published numbers."
FAILED, MISSED = "§", "¶"
MARKS = {reliability.FINE: "", reliability.LOOK: "°", reliability.UNRELIABLE: "†"}
SELECTION_RULES = {
    "best_val": "the epoch with the best PGD accuracy on held-out training images, "
    "among those in which the network is at its sparsity",
    "best_clean": "the epoch with the best clean accuracy on held-out training images, "
    "among those in which the network is at its sparsity",
    "last": "the last epoch",
}
OBJECTIVES = {
    "natural": "plain training",
    "at": "adversarial training",
    "mat": "mixed-batch adversarial training",
    "trades": "TRADES",
    "mart": "MART",
    "rst": "robust self-training",
}


def objective(name: str) -> str:
    """Short and full name of an objective: "at (adversarial training)"."""
    return f"{name} ({OBJECTIVES[name]})" if name in OBJECTIVES else name


def percent(share: float) -> str:
    """A sparsity in %, not rounded: 0.95 -> "95 %"."""
    return f"{100 * share:.10g} %"


def accuracy_percent(share: float, sign: str = "") -> str:
    """An accuracy or a difference in %, with one decimal and the character "−" for minus.

    sign: "+" prints the sign of positive values too.
    """
    return NONE if np.isnan(share) else f"{100 * share:{sign}.1f}".replace("-", "−")


def marked(text: str, grade: str) -> str:
    """A text with the mark of a grade: "40.0 †"; without a mark if the grade is "fine"."""
    return f"{text} {MARKS[grade]}".rstrip()


def radius(eps: float) -> str:
    """An eps (pixels in [0,1]) as text: "8/255" for a whole number of grey levels, else "0.1"."""
    levels = round(eps * 255, 6)
    return f"{levels:g}/255" if levels == round(levels) else f"{eps:g}"


def join(values: Iterable[object]) -> str:
    """Distinct values in order of appearance, with commas: "1, 2"; "n/a" if there is none.

    Missing values and empty texts are left out. A whole number is printed without ".0".
    """
    known = (value for value in values if not pd.isna(value) and value != "")
    texts = [f"{value:.12g}" if isinstance(value, float) else str(value) for value in known]
    return ", ".join(dict.fromkeys(texts)) or NONE


def epochs(study: Study, results: pd.DataFrame) -> str:
    """Epochs of each method, including dense pretraining: "30 (Dense); 60 (LWM, BCS)"."""
    by_count: dict[str, list[str]] = {}
    for method in methods(study):
        count = join(results[results.method == method].epochs.sort_values())
        by_count.setdefault(count, []).append(study.label("method", method))
    return "; ".join(f"{count} ({', '.join(names)})" for count, names in by_count.items())


def device(results: pd.DataFrame) -> str:
    """Device of training; and the device of attacks, if it is another one."""
    trained, attacked = join(results.train_device), join(results.eval_device)
    return trained if trained == attacked else f"trained on {trained}, attacked on {attacked}"


def code(results: pd.DataFrame) -> str:
    """Versions of the code; versions with uncommitted changes are marked."""
    versions = results[["code_version", "code_dirty"]].drop_duplicates()
    return join(
        f"{row.code_version}{' (with uncommitted changes)' * bool(row.code_dirty)}"
        for row in versions.itertuples()
    )
