"""Names of cells and of their files. A cell is one network of a study."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from robsparse.base.errors import UsageError
from robsparse.base.names import LONGEST_NAME, NAME, is_name
from robsparse.schema.fields import SPARSITY_DECIMALS, rounded_sparsity

_KEY = re.compile(
    f"(?P<dataset>{NAME})/(?P<arch>{NAME})/(?P<method>{NAME})/(?P<objective>{NAME})"
    r"/s(?P<sparsity>0\.[0-9]{4})/seed(?P<seed>[0-9]+)"
)


@dataclass(frozen=True, order=True)
class Cell:
    """One network.

    sparsity: share of prunable weights that are zero, in [0,1). It is rounded only here, to the
        four decimals of the key.

    Raises:
        UsageError: if a name is not safe in a path and in a shell command of the workflow.
    """

    dataset: str
    arch: str
    method: str
    objective: str
    sparsity: float
    seed: int

    def __post_init__(self) -> None:
        for axis in ("dataset", "arch", "method", "objective"):
            if not is_name(getattr(self, axis)):
                raise UsageError(
                    f"{axis} {json.dumps(getattr(self, axis))}: expected a name of at most "
                    f"{LONGEST_NAME} letters, digits, - and _"
                )
        object.__setattr__(self, "sparsity", rounded_sparsity(self.sparsity))

    @property
    def sparsity_text(self) -> str:
        """The sparsity as text with four decimals, for keys and seeds: 0.9500."""
        return f"{self.sparsity:.{SPARSITY_DECIMALS}f}"

    @property
    def key(self) -> str:
        """The name, which is also a path: digits/small_cnn/bcs/at/s0.9500/seed0."""
        return (
            f"{self.dataset}/{self.arch}/{self.method}/{self.objective}"
            f"/s{self.sparsity_text}/seed{self.seed}"
        )

    @classmethod
    def parse(cls, key: str) -> "Cell":
        """Make a cell from its key. Raises UsageError if the text is not a key."""
        found = _KEY.fullmatch(key.strip("/"))
        if not found:
            raise UsageError(
                f"cell '{key}': expected dataset/arch/method/objective/s0.NNNN/seedN, "
                "like digits/small_cnn/bcs/at/s0.9500/seed0"
            )
        part = found.groupdict()
        return cls(
            part["dataset"],
            part["arch"],
            part["method"],
            part["objective"],
            float(part["sparsity"]),
            int(part["seed"]),
        )


@dataclass(frozen=True)
class Layout:
    """Paths of the files of one study. `root` is the folder results/<study>."""

    root: Path

    def model(self, cell: Cell, selection: str) -> Path:
        """Saved weights; pruned weights are exactly zero (safetensors)."""
        return self.root / "models" / cell.key / f"{selection}.safetensors"

    def training(self, cell: Cell) -> Path:
        """Cost, curves and provenance of the training run (JSON)."""
        return self.root / "models" / cell.key / "training.json"

    def steps(self, cell: Cell) -> Path:
        """Pruned, regrown and active connections and their ages by step and layer (Parquet)."""
        return self.root / "models" / cell.key / "steps.parquet"

    def lifetimes(self, cell: Cell) -> Path:
        """How long regrown connections stayed active (Parquet)."""
        return self.root / "models" / cell.key / "lifetimes.parquet"

    def resume(self, cell: Cell) -> Path:
        """Folder with the resume state of an unfinished training run; no output of a rule."""
        return self.root / "resume" / cell.key

    def tables(self, partial: bool) -> Path:
        """Folder of collected tables, plots and report.

        Tables of an incomplete study have a separate folder. In the normal folder, the workflow
        would treat them as finished outputs.
        """
        return self.root / "partial" if partial else self.root

    def failed(self, cell: Cell) -> Path:
        """Text file with the reason why the training of the cell failed; absent if it did not."""
        return self.root / "failed" / f"{cell.key}.txt"

    def evaluation(self, cell: Cell, selection: str) -> Path:
        """Record of the evaluation of one network (JSON)."""
        return self.root / "evaluations" / cell.key / f"{selection}.json"

    def cache(self, cell: Cell, selection: str) -> Path:
        """Folder with the cache of an evaluation: its finished parts, if it is interrupted."""
        return self.root / "resume" / "evaluations" / cell.key / selection

    def flags(self, cell: Cell, selection: str) -> Path:
        """Outcome of each test image under each attack component (npz)."""
        return self.root / "evaluations" / cell.key / f"{selection}.flags.npz"


def derive_seed(*axes: str | int | float) -> int:
    """A 63-bit seed from a list of axes, e.g. derive_seed("init", "small_cnn", 0).

    The same axes give the same seed on every machine. If the axes do not contain the method, all
    methods have the same seed, and so the same initial weights or order of data.
    """
    text = "\x1f".join(str(axis) for axis in axes)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
