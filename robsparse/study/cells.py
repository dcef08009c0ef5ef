"""A cell is one trained network of a study, and this is the one way to name it and its files."""

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

    sparsity: the share in [0,1) of prunable weights that are zero. It is rounded here, and nowhere
        else, to the decimals that the key has.

    Raises UsageError when a name could not stand in a path and in a command of the workflow.
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
        """The sparsity as keys and seeds have it: 0.9500."""
        return f"{self.sparsity:.{SPARSITY_DECIMALS}f}"

    @property
    def key(self) -> str:
        """The readable name, also its path: digits/small_cnn/bcs/at/s0.9500/seed0."""
        return (
            f"{self.dataset}/{self.arch}/{self.method}/{self.objective}"
            f"/s{self.sparsity_text}/seed{self.seed}"
        )

    @classmethod
    def parse(cls, key: str) -> "Cell":
        """Read a key back. Raises UsageError when it does not have the form of one."""
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
    """Where the files of one study lie: `root` is results/<study>."""

    root: Path

    def model(self, cell: Cell, selection: str) -> Path:
        """Plain weights with exact zeros, in safetensors format."""
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
        """Checkpoint folder of an unfinished run; the workflow never declares it as an output."""
        return self.root / "resume" / cell.key

    def tables(self, partial: bool) -> Path:
        """Folder of collected tables, plots and report; apart while networks are missing.

        The workflow would take files in their place for finished ones.
        """
        return self.root / "partial" if partial else self.root

    def failed(self, cell: Cell) -> Path:
        """Why the last attempt to train the cell gave no network; absent if it did."""
        return self.root / "failed" / f"{cell.key}.txt"

    def evaluation(self, cell: Cell, selection: str) -> Path:
        """Result rows of one attacked model (JSON)."""
        return self.root / "evaluations" / cell.key / f"{selection}.json"

    def cache(self, cell: Cell, selection: str) -> Path:
        """Folder of finished parts of an evaluation, which a killed one goes on from."""
        return self.root / "resume" / "evaluations" / cell.key / selection

    def flags(self, cell: Cell, selection: str) -> Path:
        """Outcome of each test image under each attack component (npz)."""
        return self.root / "evaluations" / cell.key / f"{selection}.flags.npz"


def derive_seed(*axes: str | int | float) -> int:
    """A 63-bit seed from named axes, e.g. derive_seed("init", "small_cnn", 0).

    Two calls with the same axes give the same seed on every machine, so what is shared between
    methods (initial weights, data order) is decided by which axes are named.
    """
    text = "\x1f".join(str(axis) for axis in axes)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
