"""The weights that an evaluation attacks, and the paths of its results."""

from dataclasses import dataclass
from pathlib import Path

from robsparse.schema.external import Match, Source
from robsparse.schema.threat import Threat
from robsparse.study.cells import Cell, Layout


@dataclass(frozen=True)
class Target:
    """The weights of a cell that are attacked, and the paths of the results.

    weights: the file of weights; None if the network is built with its weights.
    match: how the tensors of the file are assigned to the tensors of the network.
    record, flags: paths of the record and of the outcomes of single images.
    cache: folder of the finished parts of the evaluation.
    """

    weights: Path | None
    match: Match
    record: Path
    flags: Path
    cache: Path

    @classmethod
    def in_study(cls, layout: Layout, cell: Cell, selection: str) -> "Target":
        """The weights of the study, trained or imported; the results belong to the study."""
        return cls(
            layout.model(cell, selection),
            "names",
            layout.evaluation(cell, selection),
            layout.flags(cell, selection),
            layout.cache(cell, selection),
        )

    @classmethod
    def beside_file(cls, path: Path, match: Match, threat: Threat) -> "Target":
        """Other weights; the results are written to the folder of their file."""
        return cls(path, match, *_beside(path, threat))

    @classmethod
    def as_built(cls, results: Path, source: Source, threat: Threat) -> "Target":
        """The weights with which foreign code builds its network."""
        place = results / source.kind / source.name.replace(":", ".")
        return cls(None, "names", *_beside(place, threat))


def _beside(path: Path, threat: Threat) -> tuple[Path, Path, Path]:
    """Paths of record, flags and cache, from the path of the weights, like net.pt.Linf-0.03137.*.

    The results of one threat do not replace those of another.
    """
    start = f"{path.name}.{threat.norm}-{threat.eps:.4g}"
    ends = ("evaluation.json", "flags.npz", "cache")
    record, flags, cache = (path.with_name(f"{start}.{end}") for end in ends)
    return record, flags, cache
