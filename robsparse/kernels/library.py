"""The compiled module of the sparse kernels, if the installation could build it."""

import functools
import importlib
from types import ModuleType

_MISSING = (
    "sparse kernels: not built, so every network is computed on the dense path; "
    "install a C compiler (e.g. gcc) and install robsparse again"
)


@functools.cache
def library() -> ModuleType | None:
    """Return the compiled module, or None. The first call without it prints one line."""
    try:
        return importlib.import_module("robsparse.kernels._kernels")
    except ImportError:
        print(_MISSING, flush=True)
        return None
