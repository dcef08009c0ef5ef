"""Which weights are attacked, and where the outcome is written."""

from dataclasses import dataclass
from pathlib import Path

from robsparse.schema.external import Match, Source
from robsparse.study.cells import Cell, Layout


@dataclass(frozen=True)
class Target:
    """Which weights of a cell are attacked, and where the outcome is written.

    weights: the file of the weights; None for the weights that the network is built with.
    record, flags: the files of the results. cache: the folder of finished parts.
    """

    weights: Path | None
    match: Match
    record: Path
    flags: Path
    cache: Path

    @classmethod
    def of_study(cls, layout: Layout, cell: Cell, selection: str) -> "Target":
        """The cell's own weights, trained or imported; the outcome is one of the study's."""
        return cls(
            layout.model(cell, selection),
            "names",
            layout.evaluation(cell, selection),
            layout.flags(cell, selection),
            layout.cache(cell, selection),
        )

    @classmethod
    def of_file(cls, path: Path, match: Match) -> "Target":
        """Other weights; the outcome lies beside them and never mixes with the study's."""
        return cls(path, match, *_beside(path))

    @classmethod
    def as_built(cls, results: Path, source: Source) -> "Target":
        """The weights that foreign code builds its network with."""
        return cls(None, "names", *_beside(results / source.kind / source.name.replace(":", ".")))


def _beside(path: Path) -> tuple[Path, Path, Path]:
    """Record, flags and cache of a network, named after `path`."""
    ends = ("evaluation.json", "flags.npz", "cache")
    record, flags, cache = (path.with_name(f"{path.name}.{end}") for end in ends)
    return record, flags, cache
