"""robsparse: train sparse networks that resist adversarial attacks, and measure them."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Functions for users, by the module that holds them. It is imported when a function is first used:
# planning a workflow imports this package, and must not load torch. __init__.pyi has their types.
_FUNCTIONS = {
    "evaluate": "robsparse.api.evaluation",
    "load": "robsparse.api.loading",
    "read_results": "robsparse.api.results",
}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'robsparse' has no attribute '{name}'")
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})
