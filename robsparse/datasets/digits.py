"""Handwritten digits that ship with scikit-learn: 1,797 real grey images of 8x8 pixels.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (the test part).
"""

import torch
from pydantic import NonNegativeInt, PositiveInt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from robsparse.config import Strict
from robsparse.datasets import Part, Splits
from robsparse.errors import UsageError

IMAGES = 1797


class Params(Strict):
    """Sizes of the held-out parts (stratified by class) and the seed that draws them."""

    validation_examples: PositiveInt = 200
    test_examples: PositiveInt = 400
    split_seed: NonNegativeInt = 0


def load(params: Params) -> Splits:
    """Split the digits. Raises UsageError when fewer than 100 images remain to train on."""
    held_out = params.validation_examples + params.test_examples
    if held_out > IMAGES - 100:
        raise UsageError(
            f"datasets.digits: {held_out} images held out of {IMAGES}, "
            f"expected at most {IMAGES - 100} so that 100 remain to train on"
        )
    digits = load_digits()
    rest, test = train_test_split(
        range(IMAGES),
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
    parts = (
        Part(x_NCHW[index], y_N[index]) for index in map(torch.tensor, (train, validation, test))
    )
    return Splits(*parts, classes=10)
