"""The 60,000 photographs of CIFAR-10 as JPEG files: train/<class>/*.jpg and test/<class>/*.jpg.

These are not the images of CIFAR-10. Compression removes part of the detail that a network and an
attack use, so results are not compared with published numbers of CIFAR-10. Every table has the name
of this data set.

The images are read from an archive or from its unpacked folders. They are decoded once, and a cache
file keeps the pixels. Names and bytes of all files have one known digest, so the path of the images
decides no result.

Source of the photographs: Krizhevsky, "Learning multiple layers of features from tiny images",
2009.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import filelock
import numpy as np
from PIL import Image
from pydantic import Field

from robsparse.base.errors import UsageError
from robsparse.base.files import write_arrays
from robsparse.datasets import Splits
from robsparse.datasets._arrays import as_part, read_npz, shuffled, split_validation
from robsparse.schema import PLACE, Augmentation, Description, Images

COUNTS = {"train": 50_000, "test": 10_000}
# SHA-256 of the name, the length and the bytes of every file, in the order of the names.
DIGEST = "50ad6748b6e21784d69d60c380dbc30b9b8ec21336aff1d7db52f1607abb89c4"
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class Params(Images):
    """data_dir: folder of cifar10-jpeg.tar.xz, or of train/ and test/. cache_dir: for the pixels.

    cache_dir has the decoded images (184 MB). Where they are, data_dir is not read.
    """

    classes: ClassVar[int] = 10
    data_dir: Annotated[str, PLACE] = "data"
    cache_dir: Annotated[str, PLACE] = "data/cache"
    validation_examples: int = Field(2000, ge=10, le=25000)
    augmentation: Augmentation = Augmentation(kind="shift", flip=True)

    def description(self) -> Description:
        """Return shape and sizes, which are known without the images."""
        return self.described((3, 32, 32), self.classes, train=50_000, test=10_000)


def load(params: Params) -> Splits:
    """Load the images. The classes are the names of the folders in alphabetical order.

    Test images are shuffled, always in the same way, so that the first n of them are a fair sample
    of the classes.

    Raises:
        UsageError: if the images are missing, or if they are not these 60,000 images.
    """
    arrays = _decoded(Path(params.data_dir), Path(params.cache_dir))
    train, test = (
        as_part(
            arrays[f"{part}_images"],
            arrays[f"{part}_labels"],
            f"datasets.cifar10_jpeg: {part}",
            params.classes,
        )
        for part in COUNTS
    )
    return Splits(
        *split_validation(train, params, "cifar10_jpeg"), shuffled(test), classes=params.classes
    )


def _decoded(data_dir: Path, cache_dir: Path) -> dict[str, np.ndarray]:
    """Return pixels (uint8 N,H,W,C) and labels of both parts; fill the cache if it is empty.

    Raises:
        UsageError: if the cache file was changed.
    """
    cache = cache_dir / f"cifar10_jpeg-{DIGEST[:16]}.npz"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{cache_dir}: cannot store decoded images here ({error})") from None
    with filelock.FileLock(cache.with_suffix(".lock")):  # of several jobs only one decodes
        if not cache.exists():
            decoded: dict[str, Any] = dict(_decode(_checked(data_dir)))
            checksum = {"checksum": _checksum(decoded)}
            write_arrays(cache, checksum | decoded, compressed=False)
    stored = read_npz(cache, (*ARRAYS, "checksum"))
    arrays = {name: stored[name] for name in ARRAYS}
    if not np.array_equal(stored["checksum"], _checksum(arrays)):
        raise UsageError(
            f"{cache}: its checksum does not fit its images; delete this file, then the images are "
            "decoded again"
        )
    return arrays


def _checksum(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the SHA-256 of all arrays, as 32 bytes (uint8)."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _checked(data_dir: Path) -> dict[str, bytes]:
    """Return the files of all images, by names like train/cat/0007.jpg, in the order of the names.

    Raises:
        UsageError: if the number of images or their digest is wrong.
    """
    files = dict(sorted(_files(data_dir)))
    where = f"datasets.cifar10_jpeg.data_dir = '{data_dir}'"
    for part, count in COUNTS.items():
        found = sum(name.startswith(f"{part}/") for name in files)
        if found != count:
            raise UsageError(f"{where}: expected {count} images in {part}/, found {found}")
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    if digest.hexdigest() != DIGEST:
        raise UsageError(
            f"{where}: these are other images (digest {digest.hexdigest()[:16]}, expected "
            f"{DIGEST[:16]}); the data set 'imagefolder' reads any images in folders"
        )
    return files


def _files(data_dir: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every image in the folders or, if there are none, in the archive.

    Raises:
        UsageError: if there is neither, or if the archive is damaged.
    """
    for root in (data_dir, data_dir / "cifar10-jpeg"):
        if (root / "train").is_dir():
            for path in root.glob("t*/*/*.jpg"):
                yield path.relative_to(root).as_posix(), path.read_bytes()
            return
    archive = data_dir / "cifar10-jpeg.tar.xz"
    if not archive.is_file():
        raise UsageError(
            f"datasets.cifar10_jpeg: not found in '{data_dir}', and there is no download; put "
            "cifar10-jpeg.tar.xz there, or its folders train/<class>/*.jpg (50,000 images) and "
            "test/<class>/*.jpg (10,000), or set datasets.cifar10_jpeg.data_dir to their folder; "
            "the data set 'cifar10' downloads the images before compression"
        )
    try:
        with tarfile.open(archive) as packed:  # read, not extracted: no path of it is used
            for member in packed:
                content = packed.extractfile(member) if member.name.endswith(".jpg") else None
                if content is not None:
                    yield "/".join(member.name.split("/")[-3:]), content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UsageError(f"{archive}: not a readable archive ({error})") from None


def _decode(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    classes = sorted({name.split("/")[1] for name in files})
    arrays = {}
    for part in COUNTS:
        own = {name: content for name, content in files.items() if name.startswith(f"{part}/")}
        images = [Image.open(io.BytesIO(content)).convert("RGB") for content in own.values()]
        arrays[f"{part}_images"] = np.stack([np.asarray(image) for image in images])
        arrays[f"{part}_labels"] = np.array([classes.index(name.split("/")[1]) for name in own])
    return arrays
