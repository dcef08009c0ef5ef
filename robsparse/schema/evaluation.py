"""Settings of the evaluation: attacks, the weights that they attack, test images.

Imports no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from robsparse.schema.fields import Name, Seed, Strict, each_once

# Which weights of a training run are saved and attacked. best_val, best_clean: those of the epoch
# with the best robust, or clean, accuracy on held-out images; last: those at the end.
Selection = Literal["best_val", "best_clean", "last"]


class SanityChecks(Strict):
    """Sanity checks of every network for gradient masking: `robsparse.evaluation.sanity_checks`."""

    n_examples: NonNegativeInt = Field(
        100, description="number of images, from the first of the evaluation; 0: no sanity checks"
    )
    queries: PositiveInt = Field(500, description="queries of the black-box attack for each image")


class Corruptions(Strict):
    """Accuracy on common corruptions: `robsparse.evaluation.corruptions`.

    Without a folder the corruptions of a data set are generated.
    """

    folders: dict[Name, str] = Field(
        default_factory=dict,
        description="by data set: a folder with labels.npy and one npy file for each corruption, "
        "such as CIFAR-10-C",
    )


class Evaluation(Strict):
    """Which attacks run on which saved weights, and on how many test images.

    batch_size: images that are attacked at once.
    seed: random numbers of the attacks. An attack has the same for all networks.
    sanity_checks: checks of every network for gradient masking.
    """

    n_examples: PositiveInt = Field(description="number of test images, from the first")
    batch_size: PositiveInt = 250
    seed: Seed = 0
    selections: dict[Selection, Annotated[list[Name], Field(min_length=1)]] = Field(
        min_length=1,
        description="attacks to run on the weights of each selection; training saves best_clean "
        "only if it is listed here",
    )
    sanity_checks: SanityChecks = SanityChecks()
    corruptions: Corruptions | None = Field(
        None, description="also measure the accuracy on common corruptions; null: do not"
    )
    latency: bool = Field(
        False,
        description="also measure the time of one image (column latency_ms); it differs between "
        "runs and machines",
    )

    @field_validator("selections")
    @classmethod
    def _no_repeats(cls, selections: dict[str, list[str]]) -> dict[str, list[str]]:
        for names in selections.values():
            each_once(names)
        return selections


class EvaluationSection(Evaluation):
    """The section as the file has it: the parameters of attacks are still mappings.

    attacks: parameters by name; an attack without an entry has its defaults.
    """

    attacks: dict[Name, Any] = Field(default_factory=dict)
