"""Result rows, files that are written whole or not at all, and where a number came from.

One JSON a job. `Row` is the only shape of a result, ours and (with `source` set) published ones.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

import robsparse
from robsparse.errors import UsageError
from robsparse.fields import radius_fault

Share = Field(ge=0, le=1)


class Row(BaseModel):
    """One measured accuracy. The first nine fields are its key.

    Accuracies and sparsities are fractions in [0,1]. A component is one part of an attack that is
    made of several; "all" is the attack as a whole. Components run one after the other on the
    images that are still robust, so the accuracy of one counts all before it. `None` means that
    the number is not known; it is printed as n/a.
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
    classes: int | None = Field(None, gt=0, description="of the data set")
    chance: float | None = Field(
        None, ge=0, le=1, description="accuracy of naming the largest class of the whole test set"
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
        None, description="whose passes the attack used: the frozen view's or the network's own"
    )

    sparsity_reached: float = Field(ge=0, le=1)
    nonzero: NonNegativeInt
    prunable: NonNegativeInt
    layers: NonNegativeInt
    dense_macs: NonNegativeInt
    sparse_macs: NonNegativeInt
    model_bytes: NonNegativeInt

    selected_epoch: int | None = None
    epochs: int | None = None
    forward_passes: int | None = None
    backward_passes: int | None = None
    train_seconds: float | None = None
    peak_active_weights: int | None = None
    peak_memory_mb: float | None = None
    train_device: str | None = None
    eval_device: str | None = None

    settings_digest: str
    code_digest: str
    code_version: str
    code_dirty: bool
    libraries: str
    data_checksum: str
    model_checksum: str
    source: Literal["measured"] | str = "measured"
    origin: str = Field("", description="where the network comes from, in words")
    failure: str = Field("", description="what went wrong in training; such a row is marked")
    suspicious: str = Field("", description="why the network's robustness is in doubt, in words")

    @model_validator(mode="after")
    def _radius_is_one(self) -> "Row":
        if fault := radius_fault(self.norm, self.eps):
            raise ValueError(f"eps: {fault}")
        return self


KEY = list(Row.model_fields)[:9]

# The packages whose code decides a number; each has a folder of its own.
CODE_PACKAGES = (
    "robsparse",
    "robsparse.method",
    "robsparse.baselines",
    "robsparse.eval",
    "robsparse.figures",
)

# Columns that a method's log has besides those of its cell; see robsparse.connections.
STEP_COLUMNS = ("step", "layer", "pruned", "regrown", "active", "age")
LIFETIME_COLUMNS = ("age", "pruned", "active")
# What `robsparse collect` writes; MANIFEST has the checksums of the others.
MANIFEST = "collected.json"
COLLECTED = (
    "results.csv",
    "results.parquet",
    "layers.csv",
    "curves.csv",
    "steps.parquet",
    "lifetimes.parquet",
    "weights.csv",
    "overlap.csv",
    "doubts.csv",
    "failures.csv",
    MANIFEST,
)
OVERLAP_COLUMNS = (
    "dataset",
    "arch",
    "objective",
    "sparsity",
    "method_a",
    "seed_a",
    "selection_a",
    "method_b",
    "seed_b",
    "selection_b",
    "overlap",
    "chance",
)


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Score interval for a binomial share, 95 % by default.

    Raises ValueError unless 0 <= successes <= n and n > 0.

    Source: E. B. Wilson, JASA 22 (1927).
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Rounding may leave 1 - 1e-17 where the interval ends at 1 exactly.
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + spread) / scale)
    return low, high


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it to `path` only on success.

    A reader sees the old file or the new one, never half of one. Raises UsageError when the folder
    cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path.parent, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise UsageError if no file can be written to a folder, before hours of work for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder}: cannot write results here ({error.strerror})")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_flags(path: Path) -> dict[str, Any]:
    """Outcomes of the single images of one evaluation. Raises UsageError when it is damaged."""
    import numpy as np  # noqa: PLC0415 (planning the workflow starts sooner without it)

    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: damaged ({error}); run `robsparse evaluate` again") from None


def contradiction(row: Any, flags: dict[str, Any]) -> str:
    """What in a row (a Row, or one of a table) is not so in the outcomes of its images; "" if none.

    Starts with the name of the column.
    """
    if not math.isclose(row.accuracy, row.n_correct / row.n_examples, abs_tol=1e-12):
        return f"accuracy = {row.accuracy}: expected {row.n_correct}/{row.n_examples}"
    interval = wilson_interval(row.n_correct, row.n_examples)
    for name, expected in zip(("ci_low", "ci_high"), interval, strict=True):
        if not math.isclose(getattr(row, name), expected, rel_tol=1e-9, abs_tol=1e-12):
            return f"{name} = {getattr(row, name)}: expected {expected}, Wilson's interval"
    seen = flags.get(f"{row.attack}.{row.component}", ())
    for name, expected in (("n_examples", len(seen)), ("n_correct", int(sum(seen)))):
        if getattr(row, name) != expected:
            return f"{name} = {getattr(row, name)}: expected {expected}, as in the flags file"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file. Raises UsageError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"{path}: damaged, not valid JSON ({error})") from None


@dataclass(frozen=True)
class Record:
    """One evaluation: result rows, nonzero weights of each layer, and how large the weights are.

    layers: layer, size, nonzero, positions. histogram: counts of nonzero prunable weights whose
    magnitude is in [low, high). doubts: what robsparse.doubts measured. outcomes: checksum of the
    file of outcomes of the single images.
    """

    rows: list[Row]
    layers: list[dict[str, Any]]
    histogram: list[dict[str, float]]
    doubts: dict[str, float]
    outcomes: str


def write_record(path: Path, record: Record) -> None:
    """Write the record of one evaluation."""
    rows = [row.model_dump() for row in record.rows]
    rest = {key: value for key, value in vars(record).items() if key != "rows"}
    write_json(path, {"rows": rows, **rest})


def read_record(path: Path) -> Record:
    """Read back what `write_record` wrote. Raises UsageError naming the field that is wrong."""
    content = read_json(path)
    try:
        if not content["rows"]:
            raise UsageError(f"{path}: expected at least one row")
        rows = [Row.model_validate(row) for row in content["rows"]]
        return Record(rows, *(content[f.name] for f in dataclasses.fields(Record)[1:]))
    except (KeyError, TypeError):
        named = ", ".join(f.name for f in dataclasses.fields(Record))
        raise UsageError(f"{path}: expected {named}; evaluate this network again") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UsageError(f"{path}: {key} = {fault['input']!r}: {fault['msg']}") from None


def file_checksum(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


@functools.cache
def provenance() -> dict[str, Any]:
    """code_version, code_dirty and libraries of this process, as columns of a Row."""
    commit, dirty = _git_state(_code_folders())
    return {
        "code_version": f"{robsparse.__version__}+{commit}" if commit else robsparse.__version__,
        "code_dirty": dirty,
        "libraries": libraries(),
    }


@functools.cache
def libraries() -> str:
    """Versions of the libraries that decide a result."""
    found = {
        name: importlib.metadata.version(name)
        for name in ("torch", "pyautoattack", "foolbox", "numpy", "scikit-learn")
    }
    found["python"] = platform.python_version()
    return " ".join(f"{name}={version}" for name, version in found.items())


def _code_folders() -> list[Path]:
    """Where the package's code lies: its own folder, and those of methods, attacks and figures."""
    found = [importlib.util.find_spec(name) for name in CODE_PACKAGES]
    return [Path(place) for spec in found if spec for place in spec.submodule_search_locations]


def _git_state(folders: list[Path]) -> tuple[str, bool]:
    """Short commit of the code in the folders, and whether it differs from that commit.

    Tracked files that were changed differ, and so do Python files in the folders that git does not
    know. ("", False) where git does not track the code, as where a project that is not this one
    holds the environment that this package is installed in.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=folders[0], env=clean, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno")
        places = [str(folder) for folder in folders]
        unknown = git("ls-files", "--others", "--", *places).splitlines()
        return commit, bool(changed) or any(name.endswith(".py") for name in unknown)
    except (OSError, subprocess.CalledProcessError):
        return "", False
