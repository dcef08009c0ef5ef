"""Your own images in folders: train/<class>/* and test/<class>/*.

A folder without train/ is enough to attack external models. All images have the same size. They are
decoded once, and a cache file keeps the pixels. The name of the cache file is a digest of all
images, so a changed image leads to a new cache file.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
from PIL import Image
from pydantic import Field

from robsparse.base.errors import UsageError, one_line
from robsparse.base.files import read_arrays, write_arrays
from robsparse.datasets import Splits
from robsparse.datasets._arrays import as_part, shuffled, split_validation, test_only
from robsparse.schema import CONTENT, PLACE, Augmentation, Images

NEEDED = ("data_dir",)  # parameters with a path that must exist
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}


class Params(Images):
    """data_dir: folder of train/ and test/. cache_dir: folder for the decoded pixels."""

    data_dir: Annotated[str, CONTENT]
    cache_dir: Annotated[str, PLACE] = "data/cache"
    validation_examples: int = Field(2000, ge=10)
    augmentation: Augmentation = Augmentation(kind="shift", flip=True)


def load(params: Params) -> Splits:
    """Load the images. The classes are the names of the folders in alphabetical order.

    The images have one channel if all of them are grey, and three channels otherwise. Test images
    are shuffled, always in the same way, so that the first n of them are a fair sample of the
    classes.

    Raises:
        UsageError: if a folder or an image is wrong. The message names it.
    """
    root = Path(params.data_dir)
    classes = _classes(root)
    folders = [part for part in ("train", "test") if (root / part).is_dir()]
    files = {part: _files(root / part, classes) for part in folders}
    arrays = _decoded(root, files, Path(params.cache_dir))
    parts = {
        part: as_part(arrays[f"{part}_images"], arrays[f"{part}_labels"], str(root / part))
        for part in files
    }
    test = shuffled(parts["test"])
    if "train" not in parts:
        return test_only(test, len(classes))
    kept, held_out = split_validation(parts["train"], params, "imagefolder")
    return Splits(kept, held_out, test, classes=len(classes))


def _classes(root: Path) -> list[str]:
    if not (root / "test").is_dir():
        raise UsageError(f"{root / 'test'}: no such folder, expected one folder for each class")
    found = {
        part: sorted(p.name for p in (root / part).iterdir() if p.is_dir())
        for part in ("train", "test")
        if (root / part).is_dir()
    }
    for part, names in found.items():
        if len(names) < 2:
            raise UsageError(
                f"{root / part}: expected at least two folders, one for each class, found "
                f"{len(names)}"
            )
    odd = sorted(set(found.get("train", found["test"])) ^ set(found["test"]))
    if odd:
        where = "train" if odd[0] in found["train"] else "test"
        raise UsageError(
            f"{root}: expected the same classes in train and test, found '{odd[0]}' only in {where}"
        )
    return found["test"]


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return the path and the label of every image of a part."""
    found = []
    for label, name in enumerate(classes):
        images = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not images:
            raise UsageError(
                f"{folder / name}: found no images (expected {', '.join(sorted(SUFFIXES))})"
            )
        found += [(path, label) for path in images]
    return found


def _decoded(
    root: Path, files: dict[str, list[tuple[Path, int]]], cache_dir: Path
) -> dict[str, np.ndarray]:
    """Return pixels (uint8 N,H,W,C) and labels of both parts; fill the cache if it is empty."""
    cache = cache_dir / f"{_content(root, files)}.npz"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{cache_dir}: cannot store decoded images here ({error})") from None
    with filelock.FileLock(cache.with_suffix(".lock")):  # of several jobs only one decodes
        if not cache.exists():
            arrays: dict[str, Any] = dict(_decode(files))
            write_arrays(cache, arrays, compressed=False)
    return read_arrays(cache, "delete it, then the images are decoded again")


def _content(root: Path, files: dict[str, list[tuple[Path, int]]]) -> str:
    """Return a digest of the names and bytes of all images."""
    digest = hashlib.sha256()
    for path, _ in _all(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def _all(files: dict[str, list[tuple[Path, int]]]) -> Iterator[tuple[Path, int]]:
    for part in files.values():
        yield from part


def _decode(files: dict[str, list[tuple[Path, int]]]) -> dict[str, np.ndarray]:
    mode = "L" if all(_open(path).mode in ("1", "L") for path, _ in _all(files)) else "RGB"
    first = next(_all(files))[0]
    size = _open(first).size
    arrays = {}
    for part, images in files.items():
        pixels = []
        for path, _ in images:
            image = _open(path)
            if image.size != size:
                raise UsageError(
                    f"{path}: expected all images of one size, found {_size(image.size)} here and "
                    f"{_size(size)} in {first}"
                )
            try:
                pixels.append(np.asarray(image.convert(mode), dtype=np.uint8))
            except Exception as error:  # of many kinds, if the bytes are random
                raise UsageError(f"{path}: not a readable image ({one_line(error)})") from None
        arrays[f"{part}_images"] = np.stack(pixels).reshape(len(pixels), size[1], size[0], -1)
        arrays[f"{part}_labels"] = np.array([label for _, label in images], dtype=np.int64)
    return arrays


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception:  # of many kinds, if the bytes are random
        raise UsageError(f"{path}: not a readable image") from None


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
