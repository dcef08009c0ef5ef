"""Import robustbench, which needs a package `autoattack` that is not on the package index.

Do not call `robustbench.benchmark()`: it calls the attack with arguments that pyautoattack does not
accept. Its data, its model zoo and its `clean_accuracy` work. Use the evaluation of this project
for attacks.
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
    """Import and return robustbench; it gets pyautoattack when it imports `autoattack`.

    Raises:
        UsageError: if the extra `robustbench` is not installed.
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
