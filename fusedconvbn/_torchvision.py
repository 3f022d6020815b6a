"""torchvision's definitions of models, also beside a torch that torchvision's own operators do not fit."""

import importlib
import sys
from types import ModuleType

import torch

_OPERATORS = ("nms", "qnms")  # what `import torchvision` refers to; no classifier calls them
_libraries: list[torch.library.Library] = []


def models() -> ModuleType:
    """``torchvision.models``. Operators are only declared where torchvision's library, which has them, did not load.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # of an import that stopped half way
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # whose end would be that of its operators
    return importlib.import_module("torchvision.models")
