"""Fashion-MNIST: 60,000 training and 10,000 test grey images of 28x28 pixels in 10 classes.

Source: Xiao, Rasul, Vollgraf, arXiv 1708.07747.
"""

import gzip
import zlib
from pathlib import Path
from typing import ClassVar

from robsparse.base.errors import UsageError, one_line
from robsparse.base.files import write_bytes
from robsparse.datasets import Splits, _torchvision
from robsparse.schema import Augmentation, Description, Downloaded

# Debian's package dataset-fashion-mnist puts the four .gz files here.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class Params(Downloaded):
    """data_dir: folder of FashionMNIST/raw/; missing data is downloaded or unpacked to it.

    The four .gz files of the data set may be in data_dir, or in the folder of Debian's package
    dataset-fashion-mnist.
    """

    classes: ClassVar[int] = 10
    augmentation: Augmentation = Augmentation(kind="shift", flip=True)

    def description(self) -> Description:
        """Return shape and sizes, which are known without the images."""
        return self.described((1, 28, 28), self.classes, train=60_000, test=10_000)


def load(params: Params) -> Splits:
    """Load the official test images in their order; split off validation from training images."""
    _unpack_local_copy(Path(params.data_dir))
    which = {"train": {"train": True}, "test": {"train": False}}
    return _torchvision.load("fashion_mnist", "FashionMNIST", params, **which)


def _unpack_local_copy(folder: Path) -> None:
    """Unpack local .gz files to the folder that torchvision reads; it does not accept links."""
    raw = folder / "FashionMNIST" / "raw"
    for source in (folder, DEBIAN):
        if all((source / f"{name}.gz").exists() for name in FILES):
            for name in FILES:
                if not (raw / name).exists():
                    write_bytes(raw / name, _unpacked(source / f"{name}.gz"))
            return


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: not a readable gzip file ({one_line(error)})") from None
