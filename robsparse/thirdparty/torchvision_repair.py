"""Import torchvision next to a torch that its compiled library does not fit.

The wheel on the package index is built for CUDA. Beside a CPU-only torch its library cannot load,
and `import torchvision` then fails because the operators of the library are missing, although data
sets and transforms need none of them. Declaring the two that the import looks up is enough.
"""

import importlib
from types import ModuleType

import torch

_MISSING = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_declared: list[torch.library.Library] = []  # a Library takes its operators with it when it dies


def import_torchvision() -> ModuleType:
    """Import and return torchvision; its missing operators are declared only if they must be."""
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
