"""Which weights are attacked, and where the outcome is written."""

from dataclasses import dataclass
from pathlib import Path

from robsparse.schema.external import Match, Source
from robsparse.study.cells import Cell, Layout


@dataclass(frozen=True)
class Target:
    """Which weights of a cell are attacked, and where the outcome is written.

    weights: the file that they are loaded from; None for those that the network is built with.
    """

    weights: Path | None
    match: Match
    record: Path
    flags: Path

    @classmethod
    def of_study(cls, layout: Layout, cell: Cell, selection: str) -> "Target":
        """The cell's own weights, trained or taken in; the outcome is one of the study's."""
        return cls(
            layout.model(cell, selection),
            "names",
            layout.evaluation(cell, selection),
            layout.flags(cell, selection),
        )

    @classmethod
    def of_file(cls, path: Path, match: Match) -> "Target":
        """Other weights; the outcome lies beside them and never mixes with the study's."""
        return cls(path, match, *_beside(path))

    @classmethod
    def as_built(cls, results: Path, source: Source) -> "Target":
        """The weights that foreign code builds its network with."""
        return cls(None, "names", *_beside(results / source.kind / source.name.replace(":", ".")))


def _beside(path: Path) -> tuple[Path, Path]:
    """Record and flags of a network, named after `path`."""
    return path.with_name(f"{path.name}.evaluation.json"), path.with_name(f"{path.name}.flags.npz")
