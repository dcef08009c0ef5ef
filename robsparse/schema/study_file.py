"""The model of a config file, before its named parts are filled in. Imports no torch."""

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

# Folders of results/ that do not belong to a study.
OWN_FOLDERS = ("reference", "published", "callable", "zoo")


class StudyFile(Strict):
    """One config file as it is written: named parts are still mappings.

    In datasets, archs, methods and evaluation.attacks, a new name defines a variant of a registered
    part: {base: NAME, label: TEXT, parameters...}.

    title: printed over tables and plots.
    grid: the networks: one block, or a list of blocks.
    datasets, archs, methods: parameters by name; a part without an entry has its defaults.
    threat: norm and radius of the adversary.
    training: settings of training that all methods share.
    evaluation: attacks, and the weights and images that they attack.
    machine: where jobs run, and what they may use.

    robsparse.study.resolving makes a Study from it. All other code reads the Study.
    """

    study: Name = Field(description="names results/<study>")
    title: str
    small: bool = Field(False, description="label every table and plot as a small study")
    grid: list[Grid] = Field(default_factory=list)
    datasets: dict[Name, Any] = Field(default_factory=dict)
    archs: dict[Name, Any] = Field(default_factory=dict)
    methods: dict[Name, Any] = Field(default_factory=dict)
    models: dict[Name, External] = Field(
        default_factory=dict, description="external models by name"
    )
    threat: Threat
    training: Training
    evaluation: EvaluationSection
    machine: Machine = Machine()
    tables: list[Table] = Field(
        default_factory=list, description="more tables, for example those of a paper"
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
                "used_name",
                "expected another name: the folder results/{name} does not belong to a study",
                {"name": name},
            )
        return name
