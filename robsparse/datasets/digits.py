"""Handwritten digits that ship with scikit-learn: 1,797 real grey images of 8x8 pixels.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI (the test part).
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from robsparse.base.errors import UsageError
from robsparse.datasets import Part, Splits
from robsparse.datasets._arrays import stratified_split
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
    x_NCHW, y_N = _read()
    seed, labels_N = params.split_seed, y_N.numpy()
    rest, test = stratified_split(labels_N, params.test_examples, seed)
    train, validation = (
        rest[part] for part in stratified_split(labels_N[rest], params.validation_examples, seed)
    )
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


def _read() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images, x_NCHW in [0,1], and their labels, y_N.

    Reads the file of scikit-learn and does not import the library, which takes a second.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UsageError("datasets.digits: scikit-learn, which has its images, is not installed")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    x_NCHW = torch.tensor(table[:, :-1] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    return x_NCHW, torch.tensor(table[:, -1], dtype=torch.int64)
