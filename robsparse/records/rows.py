"""Result rows. A row has one measured accuracy, with its settings, its cost and its provenance.

All results are rows. A published accuracy is a row with another `source`.
"""

import functools
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from robsparse.schema.fields import radius_error

Share = Field(ge=0, le=1)


class Row(BaseModel):
    """One measured accuracy. The first nine fields are its key.

    Accuracies and sparsities are fractions in [0,1]. A component is one part of an attack that has
    several parts; "all" is the whole attack. Components run one after the other on the images that
    are still robust. So the accuracy after a component includes all components before it. `None`
    means that the number is not known; it is printed as n/a.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    arch: str
    method: str
    objective: str
    sparsity: float = Field(ge=0, lt=1)
    seed: int
    selection: str
    attack: str
    component: str

    accuracy: float = Share
    n_correct: NonNegativeInt
    n_examples: int = Field(gt=0)
    ci_low: float = Share
    ci_high: float = Share
    classes: int | None = Field(None, gt=0, description="number of classes of the data set")
    chance: float | None = Field(
        None,
        ge=0,
        le=1,
        description="accuracy if the largest class is always predicted",
    )

    norm: str
    eps: float = Field(ge=0)
    steps: int | None = None
    restarts: int | None = None
    version: str | None = None
    attack_seed: int | None = None
    warnings: str = ""
    max_perturbation: float | None = Field(None, ge=0)
    nan_count: NonNegativeInt = 0
    attack_seconds: float | None = Field(None, ge=0)
    attacked_on: Literal["view", "network"] | None = Field(
        None, description="the attack used passes of the folded view, or of the network itself"
    )

    sparsity_reached: float = Field(ge=0, le=1)
    nonzero: NonNegativeInt
    prunable: NonNegativeInt
    layers: NonNegativeInt
    dense_macs: NonNegativeInt
    sparse_macs: NonNegativeInt
    model_bytes: int = Field(
        ge=0,
        description="bytes of all tensors in the compact file that `robsparse export` writes",
    )

    selected_epoch: int | None = None
    epochs: int | None = None
    forward_passes: int | None = None
    backward_passes: int | None = None
    train_seconds: float | None = None
    peak_active_weights: int | None = None
    training_state_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of the parameters, gradients, optimiser state, masks and scores that "
        "training held",
    )
    peak_memory_mb: float | None = None
    train_device: str | None = None
    eval_device: str | None = None
    latency_ms: float | None = Field(
        None, gt=0, description="median time of one image on eval_device, in milliseconds"
    )

    settings_digest: str
    code_digest: str
    code_version: str
    code_dirty: bool
    libraries: str
    kernels: str = Field(
        "",
        description="instruction set of the sparse kernels in the evaluation: avx512, avx2, plain "
        'or "not built"; "" on a GPU',
    )
    data_checksum: str
    model_checksum: str
    source: Literal["measured"] | str = "measured"
    origin: str = Field("", description="where the network comes from, as text")
    failure: str = Field("", description="why training failed, as text; the row is then marked")
    potentially_unreliable: str = Field(
        "", description='why the network is potentially unreliable, as text; "" if it is not'
    )

    @model_validator(mode="after")
    def _check_radius(self) -> "Row":
        if error := radius_error(self.norm, self.eps):
            raise ValueError(f"eps: {error}")
        return self


KEY = list(Row.model_fields)[:9]
Z_95 = 1.959963984540054  # a normal variable lies within +- this with a probability of 95 %


@functools.cache
def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a binomial share: (low, high), both in [0,1].

    Raises:
        ValueError: unless 0 <= successes <= n and n > 0.

    Source: E. B. Wilson, JASA 22 (1927).
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes in {n} trials: must be in 0..n, n > 0")
    share, z = successes / n, Z_95
    whole = 2 * (n + z**2)
    centre = (2 * n * share + z**2) / whole
    half = z / whole * math.sqrt(4 * n * share * (1 - share) + z**2)
    low = centre - half if successes > 0 else 0.0
    high = centre + half if successes < n else 1.0
    return low, high


def contradiction(row: Any, flags: dict[str, Any]) -> str:
    """Compare a row with the outcomes of its images.

    Args:
        row: a Row, or a row of results.csv with the same attributes.
        flags: outcomes of the images by "attack.component", as in the flags file.

    Returns:
        The first contradiction, which starts with the name of the column; "" if there is none.
    """
    if not math.isclose(row.accuracy, row.n_correct / row.n_examples, abs_tol=1e-12):
        return f"accuracy = {row.accuracy}: expected {row.n_correct}/{row.n_examples}"
    interval = wilson_interval(row.n_correct, row.n_examples)
    for name, expected in zip(("ci_low", "ci_high"), interval, strict=True):
        if not math.isclose(getattr(row, name), expected, rel_tol=1e-9, abs_tol=1e-12):
            return f"{name} = {getattr(row, name)}: expected {expected}, Wilson's interval"
    seen = flags.get(f"{row.attack}.{row.component}")
    counts = (0, 0) if seen is None else (len(seen), int(seen.sum()))
    for name, expected in zip(("n_examples", "n_correct"), counts, strict=True):
        if getattr(row, name) != expected:
            return f"{name} = {getattr(row, name)}: expected {expected}, as in the flags file"
    return ""
