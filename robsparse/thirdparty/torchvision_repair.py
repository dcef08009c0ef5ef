"""Import torchvision even if its compiled library does not fit the installed torch.

The wheel on the package index is built for CUDA. With a CPU-only torch its library cannot be
loaded. `import torchvision` then fails because operators of the library are missing, although data
sets and transforms do not need them. It is enough to declare the two operators that the import
looks up.
"""

import importlib
from types import ModuleType

import torch

_MISSING = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # its operators exist as long as a Library does


def import_torchvision() -> ModuleType:
    """Import and return torchvision; declare its operators only if the import needs them."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _MISSING.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _declared.append(library)
    return importlib.import_module("torchvision")
