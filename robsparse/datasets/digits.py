"""Handwritten digits that ship with scikit-learn: 1,797 real grey images of 8x8 pixels.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (the test part).
"""

import torch
from pydantic import Field, NonNegativeInt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from robsparse.datasets import Part, Splits
from robsparse.schema import Augmentation, Description, Strict


class Params(Strict):
    """Sizes of the parts, which are stratified by class.

    validation_examples, test_examples: number of images.
    split_seed: random numbers of the splits; the seed of a network does not decide them.
    augmentation: random changes of the training images.
    """

    validation_examples: int = Field(200, ge=10, le=800)
    test_examples: int = Field(400, ge=10, le=800)
    split_seed: NonNegativeInt = 0
    augmentation: Augmentation = Augmentation()

    def description(self) -> Description:
        """Return shape and sizes, which are known without the images."""
        held_out = self.validation_examples, self.test_examples
        return Description((1, 8, 8), 10, 1797 - sum(held_out), *held_out)


def load(params: Params) -> Splits:
    """Split the digits into test, validation and training images."""
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
    parts = {"train": train, "validation": validation, "test": test}
    indices = {name: torch.tensor(index) for name, index in parts.items()}
    return Splits(
        **{name: Part(x_NCHW[index], y_N[index]) for name, index in indices.items()}, classes=10
    )
