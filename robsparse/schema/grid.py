"""The networks of a study, and the tables of papers that show them. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from robsparse.schema.evaluation import Selection
from robsparse.schema.fields import PLACE, Name, Seed, Sparsity, Strict, each_once
from robsparse.schema.training import Objective

Axis = Literal["dataset", "arch", "objective", "method", "sparsity"]

# Tables that `robsparse figures` writes to tables/ for every study.
OWN_TABLES = ("main", "main_notes", "per_class", "disagreements")


class Budget(Strict):
    """The same cost of training for every sparse network of a block.

    All stages of a method are lengthened or shortened by the same factor until the training costs
    `total`. The cost includes the dense network that the method starts from; the epochs of that
    network do not change.

    unit: epochs, or forward and backward passes over each training image; with passes, expensive
        objectives get fewer epochs.
    total: the number of units.
    """

    unit: Literal["epochs", "passes"]
    total: PositiveInt


class Grid(Strict):
    """A block of cells: all combinations of these lists. Dense is trained once for each seed.

    datasets, archs, methods: names of registered parts or of variants.
    objectives: losses of the training.
    sparsities: shares of prunable weights that are zero at the end, at most four decimals.
    seeds: one network is trained for each seed.
    budget: the same cost of training for all sparse networks; null: the epochs of each method.
    """

    datasets: list[Name] = Field(min_length=1)
    archs: list[Name] = Field(min_length=1)
    objectives: list[Objective] = Field(min_length=1)
    methods: list[Name] = Field(min_length=1)
    sparsities: list[Sparsity] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)
    params: dict[Name, Any] = Field(
        default_factory=dict,
        description="hyperparameters of methods in this block; they override the section methods",
    )
    training: Any = Field(
        default_factory=dict,
        description="training settings of this block, for example those of a publication; they "
        "override the section training",
    )
    budget: Budget | None = None
    where_exists: str | None = Field(
        None, description="a file; without it the block is left out, with a message"
    )

    @field_validator("datasets", "archs", "objectives", "methods", "sparsities", "seeds")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        return each_once(values)


class Table(Strict):
    """A table of a paper with the results of this study and published numbers.

    On an axis in `as_base`, a variant is printed in the line of its base and compared with the
    published numbers of its base. So methods that use different variants of a data set or an
    architecture can be in one line.

    title: printed over the table.
    datasets, archs, objectives, methods: what the table shows; an empty list: all of the study.
    rows: each combination of these axes is a line.
    columns: axes with a column for each value. An axis in neither must have only one value.
    attacks: accuracies that are printed.
    selection: which saved weights.
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
                "used_name", f"expected a name other than {', '.join(OWN_TABLES)}", {}
            )
        return name

    @field_validator(
        *("datasets", "archs", "objectives", "methods", "rows", "columns", "as_base", "attacks")
    )
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        return each_once(values)

    @model_validator(mode="after")
    def _rows_and_columns_differ(self) -> "Table":
        if set(self.rows) & set(self.columns):
            raise PydanticCustomError(
                "axes", "expected axes that are not in rows", {"key": "columns"}
            )
        return self
