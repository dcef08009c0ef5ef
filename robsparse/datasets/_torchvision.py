"""Data sets that torchvision knows: its download and checksums, our splits."""

from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic import BaseModel

from robsparse.base.errors import UsageError
from robsparse.datasets import Splits
from robsparse.datasets._arrays import as_part, held_out
from robsparse.schema.imagesets import Downloaded
from robsparse.thirdparty.torchvision_repair import import_torchvision


def load(name: str, class_name: str, params: Downloaded, **which: Any) -> Splits:
    """Official training and test images of a data set; validation images come out of the former.

    name: as in a study. class_name: torchvision's. which: for "train" and "test", the arguments
    that make torchvision's class give that part.

    Raises UsageError that names the ways to supply the data when it is neither there nor to be had.
    """
    make = getattr(import_torchvision().datasets, class_name)
    folder = Path(params.data_dir)
    parts = {}
    for part in ("train", "test"):
        found = _present(make, name, folder, params, which[part])
        images, labels = np.asarray(found.data), _labels(found)
        where = f"{folder}: {name}, {part}"
        parts[part] = as_part(images, labels, where, params.classes)
    return Splits(*held_out(parts["train"], params, name), parts["test"], classes=params.classes)


def _present(make: Any, name: str, folder: Path, params: BaseModel, which: dict[str, Any]) -> Any:
    """torchvision's data set from disk, downloaded first if it is not there."""
    try:
        return make(root=folder, download=False, **which)
    except RuntimeError:  # not there, or damaged
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{name}.lock"):  # jobs of a study start together
            return make(root=folder, download=True, **which)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"datasets.{name}: not in '{folder}' and not to be downloaded ({_short(error)}); "
            f"supply it in one of three ways: an existing copy, named by datasets.{name}.data_dir; "
            "a run of this command where there is a network, which downloads it there; or the same "
            "images as the data set 'imagefolder' or 'npz'"
        ) from None


def _labels(found: Any) -> np.ndarray:
    """Class of each image, under the name that torchvision's class has for it."""
    return np.asarray(found.targets if hasattr(found, "targets") else found.labels)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
