"""Models that were trained elsewhere, and where a network comes from. No torch in here.

Training, the workflow, evaluation, collection, figures and export ask a Source;
`robsparse.networks.construct` opens what it describes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.fields import CONTENT, Claimed, Name, Strict
from robsparse.schema.training import Objective

# A network of RobustBench's zoo; some of its names have dots.
_ZOO = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

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


def _is_function(text: str) -> bool:
    """Whether a text is module:function, as Python writes it."""
    module, _, function = text.partition(":")
    return len(text) <= 200 and all(map(str.isidentifier, [*module.split("."), function]))


class External(Strict):
    """A network that was trained elsewhere: attacked and printed like all others, never trained.

    Its weights come from `file` (safetensors, or a state dict saved by torch) for an arch of the
    study, from RobustBench's model zoo (`zoo`), or with the network that a Python function returns
    (`callable`).
    """

    file: Annotated[str | None, CONTENT] = None
    arch: Name | None = Field(
        None,
        description="name in the section archs, or a registered one; for zoo and callable: the one "
        "in whose table the network stands",
    )
    zoo: str | None = Field(None, description="name of a model in RobustBench's zoo")
    callable: str | None = Field(
        None,
        description="module:function of a function without arguments that returns a torch module "
        "which maps images in [0,1] to logits",
    )
    dataset: Name
    objective: Objective = Field(description="what it was trained with")
    sparsity: Claimed = Field(
        0.0, description="as its authors say it; tables mark it when the count differs"
    )
    label: str = Field("", description="printed name")
    mean: tuple[float, ...] | None = Field(
        None, description="subtracted from each channel before the first layer"
    )
    std: tuple[PositiveFloat, ...] | None = Field(None, description="divided by, after mean")
    match: Match = Field(
        "names", description="whether the file's tensors are ours by name, or in their order"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "External":
        if [self.zoo, self.file, self.callable].count(None) != 2:
            raise PydanticCustomError(
                "source", "expected one of file, zoo and callable", {"key": "file"}
            )
        if self.callable is not None and not _is_function(self.callable):
            raise PydanticCustomError(
                "source", "expected module:function, like mynets:resnet", {"key": "callable"}
            )
        if self.zoo is not None and not _ZOO.fullmatch(self.zoo):
            raise PydanticCustomError(
                "source", "expected the name of a network in RobustBench's zoo", {"key": "zoo"}
            )
        if self.file is not None and self.arch is None:
            raise PydanticCustomError("source", "expected the arch of the file", {"key": "arch"})
        if (self.mean is None) != (self.std is None):
            raise PydanticCustomError("source", "expected std beside it", {"key": "mean"})
        for key in ("mean", "match"):
            if self.file is None and key in self.model_fields_set:
                raise PydanticCustomError(
                    "source",
                    "expected it for a file alone: a network of a callable or the zoo takes images "
                    "in [0,1] and has its own weights",
                    {"key": key},
                )
        return self

    @property
    def source(self) -> Source:
        """Where the network comes from."""
        kinds: dict[Kind, str | None] = {
            "file": self.file,
            "callable": self.callable,
            "zoo": self.zoo,
        }
        [(kind, name)] = [(kind, name) for kind, name in kinds.items() if name is not None]
        return Source(kind, name, self.match)
