"""The compiled module of the sparse kernels, if the installation could build it."""

import functools
import importlib
from types import ModuleType

from robsparse.kernels import sources


@functools.cache
def library() -> ModuleType | None:
    """Return the compiled module, or None. The first call without it prints one line."""
    found = _find()
    if isinstance(found, str):
        print(
            f"sparse kernels: {found}, so every network is computed on the dense path; install "
            "a C compiler (e.g. gcc), then install robsparse again (`make install`)",
            flush=True,
        )
        return None
    return found


def _find() -> ModuleType | str:
    """Return the compiled module, or the reason why there is none."""
    try:
        module = importlib.import_module("robsparse.kernels._kernels")
    except ModuleNotFoundError:
        return "not built"
    except ImportError as error:
        return f"not loaded ({error})"
    if module.sources != sources.digest():
        return "built from other sources than those of this version"
    return module


def instructions(device_type: str = "cpu") -> str:
    """Return the instruction set of the kernels, for records.

    It is avx512, avx2, plain or "not built"; "" on a device that is not a CPU.
    """
    if device_type != "cpu":
        return ""
    module = library()
    return module.instructions() if module else "not built"
