"""Handwritten digits that ship with scikit-learn: 1,797 real grey images of 8x8 pixels.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (the test part).
"""

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from robsparse.base.errors import UsageError
from robsparse.datasets import Part, Splits
from robsparse.schema import Augmentation, Description, Strict

EPS = {"Linf": 0.15}  # the radius of `robsparse evaluate` if none is given


class Params(Strict):
    """Sizes of the parts, which are stratified by class.

    validation_examples, test_examples: number of images.
    train_examples: number of training images that are used; null: all others.
    split_seed: random numbers of the splits; the seed of a network does not decide them.
    augmentation: random changes of the training images.
    """

    validation_examples: int = Field(200, ge=10, le=800)
    test_examples: int = Field(400, ge=10, le=800)
    train_examples: PositiveInt | None = None
    split_seed: NonNegativeInt = 0
    augmentation: Augmentation = Augmentation()

    def description(self) -> Description:
        """Return shape and sizes, which are known without the images."""
        held_out = self.validation_examples, self.test_examples
        others = 1797 - sum(held_out)
        return Description((1, 8, 8), 10, min(others, self.train_examples or others), *held_out)


def load(params: Params) -> Splits:
    """Split the digits into test, validation and training images.

    Raises:
        UsageError: if there are fewer training images than the parameters ask for.
    """
    digits = load_digits()
    rest, test = train_test_split(
        range(len(digits.target)),
        test_size=params.test_examples,
        random_state=params.split_seed,
        stratify=digits.target,
    )
    train, validation = train_test_split(
        rest,
        test_size=params.validation_examples,
        random_state=params.split_seed,
        stratify=digits.target[rest],
    )
    x_NCHW = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    y_N = torch.tensor(digits.target, dtype=torch.int64)
    if (wanted := params.train_examples or len(train)) > len(train):
        raise UsageError(
            f"datasets.digits.train_examples = {wanted}: expected at most the {len(train)} images "
            "that are not held out"
        )
    # They are in a random order.
    parts = {"train": train[:wanted], "validation": validation, "test": test}
    indices = {name: torch.tensor(index) for name, index in parts.items()}
    return Splits(
        **{name: Part(x_NCHW[index], y_N[index]) for name, index in indices.items()}, classes=10
    )
