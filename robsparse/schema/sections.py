"""The sections of a study's configuration file, each with its defaults. No torch in here."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from robsparse.schema.fields import (
    CONTENT,
    PLACE,
    Claimed,
    Name,
    Radius,
    Share,
    Sparsity,
    Strict,
    radius_fault,
)
from robsparse.schema.imagesets import Augmentation
from robsparse.schema.sources import Kind, Match, Source

Selection = Literal["best_val", "last"]
Norm = Literal["Linf", "L2"]
Objective = Literal["natural", "at", "mat", "trades", "mart", "rst"]

MOST_EPOCHS, LARGEST_LR, MOST_THREADS = 100_000, 1000, 1024
# What `robsparse figures` itself writes to tables/, and what else lies in results/.
OWN_TABLES = ("main", "per_class", "disagreements")
OWN_FOLDERS = ("reference", "published", "callable", "zoo")
# A network of RobustBench's zoo; some of its names have dots.
_ZOO = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


class Fit(Strict):
    """How one stage is optimised: SGD with momentum, a learning-rate schedule, weight decay.

    schedule: "cosine" falls at every step; "cosine_epochs" once an epoch and an epoch late, as
        HYDRA's authors have it: epoch e = 0, 1, ... of E has (1 + cos(pi (e - 1) / E)) / 2.
    velocity: "torch" sums up gradients and multiplies the sum by the current lr; "tensorflow" sums
    up lr * gradient, so that a drop of lr does not shorten the steps already under way. The same
    while lr is constant.
    decay: "coupled" adds weight_decay*w to the gradient (torch SGD); "sgdw" shrinks every trained
    tensor by (1 - weight_decay * lr / lr_0) before the step and is *not* multiplied by lr, as in
    the optimiser of the BCS authors (equal to "coupled" in steady state when lr is 0.1
    and momentum 0.9).
    """

    epochs: PositiveInt
    lr: PositiveFloat
    schedule: Literal["constant", "cosine", "cosine_epochs", "step"] = "cosine"
    milestones: tuple[Share, ...] = Field(
        (0.5, 0.75), description="step schedule: shares of all steps after which lr drops"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step schedule: factor of each drop")
    warmup: NonNegativeInt = Field(0, description="epochs in which lr rises linearly from 0")
    clean_passes: Literal[0, 1, 2] = Field(
        0,
        description="further passes over the clean batch at each step, in train mode: they move "
        "the statistics of batch norm and are counted as cost; 1: before crafting (HARP's and "
        "ADMM's authors), 2: also after the passes of the loss (HYDRA's authors)",
    )
    momentum: Share = 0.9
    velocity: Literal["torch", "tensorflow"] = "torch"
    weight_decay: float = Field(1e-4, ge=0)
    decay: Literal["coupled", "sgdw"] = "coupled"

    @model_validator(mode="after")
    def _can_be(self) -> "Fit":
        """Here rather than in the fields, so that it also holds for fields that are redefined."""
        drops = list(self.milestones)
        for key, wrong, expected in (
            ("epochs", self.epochs > MOST_EPOCHS, f"at most {MOST_EPOCHS} epochs"),
            ("lr", self.lr > LARGEST_LR, f"a learning rate of at most {LARGEST_LR}"),
            ("weight_decay", self.weight_decay >= 1, "less than 1: the share that a step takes"),
            ("milestones", drops != sorted(set(drops)), "ascending shares, like [0.5, 0.75]"),
            (
                "warmup",
                self.warmup >= self.epochs,
                f"fewer epochs of warm-up than the {self.epochs} of the stage",
            ),
        ):
            if wrong:
                context = {"key": key, "expected": expected}
                raise PydanticCustomError("stage", "expected {expected}", context)
        return self


class FromScratch(Fit):
    """The usual schedule of adversarial training from scratch: 200 epochs, lr 0.1, drops at 50 and
    75 %, weight decay 5e-4 (Rice et al., ICML 2020; the BCS authors' in steady state).
    """

    epochs: PositiveInt = 200
    lr: PositiveFloat = 0.1
    schedule: Literal["constant", "cosine", "cosine_epochs", "step"] = "step"
    weight_decay: float = Field(5e-4, ge=0)


class Finetune(Fit):
    """HYDRA's finetuning of a pruned network: 100 epochs, lr 0.01, cosine, weight decay 1e-4."""

    epochs: PositiveInt = 100
    lr: PositiveFloat = 0.01


class Threat(Strict):
    """The adversary that models are trained against and attacked with."""

    norm: Norm = "Linf"
    eps: Radius = Field(
        description="radius in [0,1] pixel units, a number or a ratio like 8/255; for L2 the "
        "length of the whole perturbation"
    )

    @model_validator(mode="after")
    def _within_the_norm(self) -> "Threat":
        if fault := radius_fault(self.norm, self.eps):
            raise PydanticCustomError("radius", "{fault}", {"key": "eps", "fault": fault})
        return self

    def adjusted(self, settings: Strict) -> "Threat":
        """This threat with the norm and eps of `settings` where they have their own.

        settings: of an attack (a `AttackParams`), or of training, which has an eps alone. Raises
        ValidationError where the two together are no threat: Linf with an eps above 1.
        """
        own = {key: getattr(settings, key, None) for key in ("norm", "eps")}
        return Threat(**(dict(self) | {key: v for key, v in own.items() if v is not None}))


Precision = Literal["auto", "fp32", "tf32", "bf16"]
Backend = Literal["auto", "eager", "compiled", "graph"]


class Crafting(Strict):
    """Inner maximisation of training: PGD with `steps` steps of `step_size`."""

    steps: PositiveInt = 10
    step_size: Radius
    bn_mode: Literal["eval", "train"] = Field(
        "eval", description="mode of batch norm while crafting (ADMM's authors: train)"
    )
    precision: Precision = Field(
        "auto",
        description="what convolutions compute in while crafting; auto: bf16 where the device is "
        "much faster at it, else fp32 (validation and attacks are always in fp32)",
    )
    backend: Backend = Field(
        "auto",
        description="how the folded view runs while crafting; graph: as a CUDA graph; auto: eager",
    )
    eps_warmup: NonNegativeInt = Field(
        0,
        description="first epochs of a network trained from scratch in which eps and step_size "
        "rise linearly from 0",
    )


class Validation(Strict):
    """Robust accuracy on held-out training images, by which `best_val` is selected."""

    steps: PositiveInt = 10
    every: PositiveInt = Field(1, description="epochs between two validations")


class Training(Strict):
    """What every method shares while it trains."""

    batch_size: PositiveInt = 128
    crafting: Crafting
    precision: Precision = Field(
        "auto", description="what the training pass computes in (weights and updates: fp32)"
    )
    eps: Radius | None = Field(
        None,
        description="radius that is trained and validated against, if it is not the threat's",
    )
    augmentation: Augmentation | None = Field(
        None, description="how training images are varied, if not as the data set says"
    )
    beta: PositiveFloat = Field(6.0, description="weight of the KL term of TRADES and MART")
    rst_file: Annotated[str | None, CONTENT] = Field(
        None, description="rst: npz of pseudo-labelled extra images, arrays `images` and `labels`"
    )
    rst_fraction: Share = Field(
        0.5, description="rst: share of each batch that is pseudo-labelled, in [0,1)"
    )
    collapse_after: NonNegativeInt = Field(
        10,
        description="stop, and mark the result, when held-out accuracy has been that of guessing "
        "the largest class for so many validations in a row; 0: never",
    )
    log_every: PositiveInt = Field(
        1, description="steps that one row of the log of rewiring sums up"
    )
    validation: Validation = Validation()


def each_once(values: list[Any]) -> list[Any]:
    """Return the list as it is; a repeated entry is a fault of the config."""
    if len(set(values)) != len(values):
        raise PydanticCustomError("repeat", "expected each entry once", {})
    return values


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


class AttackParams(Strict):
    """Parameters of an attack that perturbs images: norm and eps where not those of the threat.

    eps in the norm: for L2 the length of the whole perturbation, pixels in [0,1]. An attack of
    another norm than the threat's has an eps of its own.
    """

    norm: Norm | None = None
    eps: Radius | None = None

    @property
    def qualifier(self) -> str:
        """What its printed name must say beside it: how it differs from what that name stands for.

        An attack that others compare with overrides it; its published numbers are then compared
        with those of the unqualified attack alone.
        """
        return ""


class SanityChecks(Strict):
    """Tests of every network for obfuscated gradients: `robsparse.evaluation.sanity_checks`."""

    n_examples: NonNegativeInt = Field(
        100, description="the first n images of the evaluation; 0: no sanity checks"
    )
    queries: PositiveInt = Field(500, description="of the black-box attack, for each image")


class Evaluation(Strict):
    """Which attacks see which saved weights, on how many test images."""

    n_examples: PositiveInt = Field(description="the first n images of the test split")
    batch_size: PositiveInt = 250
    seed: Seed = 0
    selections: dict[Selection, Annotated[list[Name], Field(min_length=1)]] = Field(
        min_length=1, description="attacks to run on the weights of each selection"
    )
    attacks: dict[Name, Any] = Field(default_factory=dict)
    sanity_checks: SanityChecks = SanityChecks()

    @field_validator("selections")
    @classmethod
    def _no_repeats(cls, selections: dict[str, list[str]]) -> dict[str, list[str]]:
        for names in selections.values():
            each_once(names)
        return selections


class Machine(Strict):
    """Where jobs run. None of it changes what is computed, only how fast."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt = Field(1, le=MOST_THREADS, description="CPU threads of one job")
    memory_mb: PositiveInt = Field(2000, description="memory that a job asks a cluster for")
    minutes: PositiveInt = Field(60, description="run time that a job asks a cluster for")
    rerun_on_code_change: bool = Field(
        False, description="let a change of the code that trains or attacks start jobs again"
    )


Axis = Literal["dataset", "arch", "objective", "method", "sparsity"]


class Table(Strict):
    """A table of a paper, filled from this study, with published numbers beside ours.

    An empty list of datasets, archs, ... stands for all of the study. Every combination of the
    `rows` axes that the study has is a line; the other axes must have one value or be columns.
    """

    name: Name = Field(description="names tables/<name>.md, .tex and .csv")
    title: str
    datasets: list[Name] = Field(default_factory=list)
    archs: list[Name] = Field(default_factory=list)
    objectives: list[Objective] = Field(default_factory=list)
    methods: list[Name] = Field(default_factory=list)
    rows: list[Axis] = Field(min_length=1)
    columns: list[Axis] = Field(min_length=1)
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

    @field_validator("datasets", "archs", "objectives", "methods", "rows", "columns", "attacks")
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
