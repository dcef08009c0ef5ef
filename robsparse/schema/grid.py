"""The networks of a study, and the tables that they are put into. No torch in here."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.evaluation import Selection
from robsparse.schema.fields import PLACE, Name, Seed, Sparsity, Strict, each_once
from robsparse.schema.training import Objective

Axis = Literal["dataset", "arch", "objective", "method", "sparsity"]

# What `robsparse figures` itself writes to tables/.
OWN_TABLES = ("main", "per_class", "disagreements")


class Budget(Strict):
    """The same cost of training for every sparse network of a block.

    The stages of a method are lengthened or shortened in proportion until they cost `total`,
    together with the dense network that they start from, whose epochs stay as they are. `epochs`
    counts epochs; `passes` counts forward and backward passes over each training image, so that
    dear objectives get fewer epochs than cheap ones.
    """

    unit: Literal["epochs", "passes"]
    total: PositiveInt


class Grid(Strict):
    """A block of cells: the product of these lists (dense is trained once a seed)."""

    datasets: list[Name] = Field(min_length=1)
    archs: list[Name] = Field(min_length=1)
    objectives: list[Objective] = Field(min_length=1)
    methods: list[Name] = Field(min_length=1)
    sparsities: list[Sparsity] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)
    params: dict[Name, Any] = Field(
        default_factory=dict,
        description="hyperparameters of this block's methods, over those of the section methods",
    )
    training: Any = Field(
        default_factory=dict,
        description="settings of this block over those of the section training, such as those "
        "that a method was published with",
    )
    budget: Budget | None = None
    where_exists: str | None = Field(
        None, description="a file without which the block is left out (and that is said)"
    )

    @field_validator("datasets", "archs", "objectives", "methods", "sparsities", "seeds")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        return each_once(values)


class Table(Strict):
    """A table of a paper, filled from this study, with published numbers beside ours.

    An empty list of datasets, archs, ... stands for all of the study. Every combination of the
    `rows` axes that the study has is a line; the other axes must have one value or be columns.
    On the axes `as_base`, a variant stands for what it is a variant of: it has the same line and
    the same published numbers. So methods stand side by side that were trained with different
    variants of a data set or an architecture.
    """

    name: Name = Field(description="names tables/<name>.md, .tex and .csv")
    title: str
    datasets: list[Name] = Field(default_factory=list)
    archs: list[Name] = Field(default_factory=list)
    objectives: list[Objective] = Field(default_factory=list)
    methods: list[Name] = Field(default_factory=list)
    rows: list[Axis] = Field(min_length=1)
    columns: list[Axis] = Field(min_length=1)
    as_base: list[Literal["dataset", "arch"]] = Field(
        default_factory=list, description="axes on which a variant has the line of its base"
    )
    attacks: list[Name] = Field(min_length=1)
    selection: Selection = "best_val"
    published: Annotated[list[str], PLACE] = Field(
        default_factory=list, description="files of published numbers, results/reference/*.csv"
    )

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name.lower() in OWN_TABLES:
            raise PydanticCustomError(
                "taken", "expected a name that is no table of every study", {}
            )
        return name

    @field_validator(
        *("datasets", "archs", "objectives", "methods", "rows", "columns", "as_base", "attacks")
    )
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        return each_once(values)

    @model_validator(mode="after")
    def _rows_are_no_columns(self) -> "Table":
        if set(self.rows) & set(self.columns):
            raise PydanticCustomError(
                "axes", "expected other axes than those of rows", {"key": "columns"}
            )
        return self
