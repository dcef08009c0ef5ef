"""Where a network comes from. No torch in here.

Training, the workflow, evaluation, collection, figures and export ask a Source;
`robsparse.networks.construct` opens what it describes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Stands for the arch of networks of foreign code that share a table with no arch of the study.
ELSEWHERE = "elsewhere"

Kind = Literal["trained", "file", "callable", "zoo"]
Match = Literal["names", "order"]


@dataclass(frozen=True)
class Source:
    """Where the networks of one method come from.

    kind: "trained" here; a "file" of weights for an arch of the study; what a "callable" of the
        user returns; a network of RobustBench's "zoo".
    name: the file's path, module:function, or the name in the zoo; "" for what is trained here.
    match: how the tensors of a file are assigned to those of the network.
    """

    kind: Kind = "trained"
    name: str = ""
    match: Match = "names"

    @property
    def external(self) -> bool:
        """Whether the network was trained elsewhere."""
        return self.kind != "trained"

    @property
    def foreign(self) -> bool:
        """Whether code that is not of this suite builds the network and computes its outputs."""
        return self.kind in ("callable", "zoo")

    @property
    def file(self) -> Path | None:
        """The file of weights, if there is one."""
        return Path(self.name) if self.kind == "file" else None

    def __str__(self) -> str:
        if self.file:
            return f"file {self.file.name}"
        return f"{self.kind} {self.name}" if self.external else "trained here"
