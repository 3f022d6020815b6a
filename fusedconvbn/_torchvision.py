"""torchvision's models, also where torchvision's own operators do not load with the installed
torch."""

import importlib
import sys
from types import ModuleType

import torch

_OPERATORS = ("nms", "qnms")  # `import torchvision` refers to them; no classifier calls them
_libraries: list[torch.library.Library] = []


def models() -> ModuleType:
    """``torchvision.models``. Where torchvision's library did not load, its operators are declared,
    so that the import succeeds.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # left by the import that failed
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # its operators exist as long as it does
    return importlib.import_module("torchvision.models")
