"""What a study's configuration file says, checked for its own shape. No torch in here."""

from typing import Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.evaluation import EvaluationSection
from robsparse.schema.external import External
from robsparse.schema.fields import Name, Strict
from robsparse.schema.grid import Grid, Table
from robsparse.schema.machine import Machine
from robsparse.schema.threat import Threat
from robsparse.schema.training import Training

# What else lies in results/ beside the folders of studies.
OWN_FOLDERS = ("reference", "published", "callable", "zoo")


class StudyFile(Strict):
    """One configuration file as it is written: named parts are still mappings.

    `grid` is one block or a list of blocks. In datasets, archs, methods and evaluation.attacks a
    new name may stand for a variant of a registered one: {base: NAME, label: TEXT, parameters...}.

    robsparse.study.resolving makes a Study of it, which all other code reads.
    """

    study: Name = Field(description="names results/<study>")
    title: str
    small: bool = Field(False, description="label every table and plot as a small study")
    grid: list[Grid] = Field(default_factory=list)
    datasets: dict[Name, Any] = Field(default_factory=dict)
    archs: dict[Name, Any] = Field(default_factory=dict)
    methods: dict[Name, Any] = Field(default_factory=dict)
    models: dict[Name, External] = Field(
        default_factory=dict, description="networks that were trained elsewhere"
    )
    threat: Threat
    training: Training
    evaluation: EvaluationSection
    machine: Machine = Machine()
    tables: list[Table] = Field(
        default_factory=list, description="tables beside the main one, such as those of a paper"
    )

    @field_validator("grid", mode="before")
    @classmethod
    def _one_block(cls, grid: Any) -> Any:
        return [grid] if isinstance(grid, dict) else grid

    @field_validator("study")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name.lower() in OWN_FOLDERS:
            raise PydanticCustomError(
                "taken", "expected another name: results/{name} is no study's", {"name": name}
            )
        return name
