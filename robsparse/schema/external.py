"""External models, and where the networks of a method come from.

Training, the workflow, evaluation, collection, figures and export read a Source.
`robsparse.networks.construct` builds the network that it describes. Imports no torch.
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

# The arch of a network of foreign code that is in no table with an arch of the study.
ELSEWHERE = "elsewhere"

Kind = Literal["trained", "file", "callable", "zoo"]
Match = Literal["names", "order"]


@dataclass(frozen=True)
class Source:
    """Where the networks of one method come from.

    kind: "trained": by this suite; "file": weights in a file, for an arch of the study;
        "callable": a Python function of the user returns the network; "zoo": from RobustBench.
    name: the path of the file, module:function, or the name in the zoo; "" for kind "trained".
    match: how the tensors of a file are assigned to the tensors of the network.
    """

    kind: Kind = "trained"
    name: str = ""
    match: Match = "names"

    @property
    def external(self) -> bool:
        """Whether it is an external model."""
        return self.kind != "trained"

    @property
    def foreign(self) -> bool:
        """Whether code from outside this suite builds the network and computes its outputs."""
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
    """Whether a text has the form module:function with valid Python names."""
    module, _, function = text.partition(":")
    return len(text) <= 200 and all(map(str.isidentifier, [*module.split("."), function]))


class External(Strict):
    """An external model. It is attacked and printed like all other networks, but never trained.

    There are three sources: a file, RobustBench's zoo, and a Python function.

    file: weights for an arch of the study: safetensors, or a state dict that torch saved.
    dataset: name in the section datasets, or of a registered data set.
    """

    file: Annotated[str | None, CONTENT] = None
    arch: Name | None = Field(
        None,
        description="name in the section archs, or of a registered arch; for zoo and callable: "
        "the network is printed in the tables of this arch",
    )
    zoo: str | None = Field(None, description="name of a model in RobustBench's zoo")
    callable: str | None = Field(
        None,
        description="module:function; the function has no arguments and returns a torch module, "
        "which maps images in [0,1] to logits",
    )
    dataset: Name
    objective: Objective = Field(description="objective of its training")
    sparsity: Claimed = Field(
        0.0, description="sparsity that its authors report; tables mark it when the count differs"
    )
    label: str = Field("", description="printed name")
    mean: tuple[float, ...] | None = Field(
        None, description="one value for each channel; subtracted before the first layer"
    )
    std: tuple[PositiveFloat, ...] | None = Field(
        None,
        description="one value for each channel; divides the image, after mean",
    )
    match: Match = Field(
        "names", description="tensors of the file are assigned by their names, or in their order"
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
            raise PydanticCustomError("source", "expected std too", {"key": "mean"})
        for key in ("mean", "match"):
            if self.file is None and key in self.model_fields_set:
                raise PydanticCustomError(
                    "source",
                    "expected it only beside a file: a network of a callable or the zoo takes "
                    "images in [0,1] and has its own weights",
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
