"""Data sets of torchvision: torchvision downloads and checks them, this module splits them."""

from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pydantic import BaseModel

from robsparse.base.errors import UsageError, one_line
from robsparse.datasets import Splits
from robsparse.datasets._arrays import as_part, split_validation
from robsparse.schema import Downloaded
from robsparse.thirdparty.torchvision_repair import import_torchvision


def load(name: str, class_name: str, params: Downloaded, **which: Any) -> Splits:
    """Load a data set; split the validation images off the official training images.

    Args:
        name: name of the data set in a study.
        class_name: name of its class in torchvision.
        params: where the data is and how it is split.
        which: for "train" and "test", the arguments of torchvision's class for that part.

    Raises:
        UsageError: if the data is not on this machine and cannot be downloaded. The message names
            the ways to supply it.
    """
    make = getattr(import_torchvision().datasets, class_name)
    folder = Path(params.data_dir)
    parts = {}
    for part in ("train", "test"):
        found = _present(make, name, folder, params, which[part])
        images, labels = np.asarray(found.data), _labels(found)
        where = f"{folder}: {name}, {part}"
        parts[part] = as_part(images, labels, where, params.classes)
    return Splits(
        *split_validation(parts["train"], params, name), parts["test"], classes=params.classes
    )


def _present(make: Any, name: str, folder: Path, params: BaseModel, which: dict[str, Any]) -> Any:
    """Return torchvision's data set; download it if it is not on disk."""
    try:
        return make(root=folder, download=False, **which)
    except RuntimeError:  # missing, or other bytes than those of the authors
        pass
    except Exception as error:  # of many kinds, if the bytes are random
        raise UsageError(
            f"datasets.{name}: the files in '{folder}' are damaged ({one_line(error)}); delete them"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{name}.lock"):  # several jobs may download at once
            return make(root=folder, download=True, **which)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"datasets.{name}: not found in '{folder}', and the download failed "
            f"({_short(error)}); do one of three things: set datasets.{name}.data_dir to an "
            "existing copy; run this command with an internet connection, which downloads it; or "
            "supply the same images as the data set 'imagefolder' or 'npz'"
        ) from None


def _labels(found: Any) -> np.ndarray:
    """Return the class of each image. torchvision calls it `targets` or `labels`."""
    return np.asarray(found.targets if hasattr(found, "targets") else found.labels)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
