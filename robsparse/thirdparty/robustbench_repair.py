"""Import robustbench, which expects an `autoattack` package that is not on the package index.

Its `benchmark()` calls the attack with arguments that pyautoattack does not take: use its data,
model zoo and `clean_accuracy`, and this suite's evaluator for attacks.
"""

import importlib
import sys
from types import ModuleType

from robsparse.base.errors import UsageError
from robsparse.thirdparty.torchvision_repair import import_torchvision

_ALIASED = (
    "",
    ".autopgd_base",
    ".checks",
    ".fab_base",
    ".fab_pt",
    ".fab_projections",
    ".other_utils",
    ".square",
    ".state",
)


def import_robustbench() -> ModuleType:
    """Import and return robustbench with `autoattack` standing for pyautoattack.

    Raises UsageError when the extra is not installed.
    """
    import_torchvision()
    for suffix in _ALIASED:
        sys.modules.setdefault(
            f"autoattack{suffix}", importlib.import_module(f"pyautoattack{suffix}")
        )
    try:
        return importlib.import_module("robustbench")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"robustbench: {error}; expected the extra, pip install 'robsparse[robustbench]'"
        ) from None
