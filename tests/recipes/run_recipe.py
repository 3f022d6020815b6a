"""Runs a script, also where torchvision's own operators do not load with the installed torch, and,
if asked, as if fusedconvbn were not installed. What `fuse` warns of is an error: that nothing is
fused, or that a fused model runs unfused.

    python run_recipe.py [--without-fusedconvbn] script.py
"""

import importlib.util
import runpy
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


def torchvision_models() -> ModuleType:
    """The module ``fusedconvbn._torchvision``, without the package around it."""
    path = Path(__file__).parents[2] / "fusedconvbn" / "_torchvision.py"
    spec = importlib.util.spec_from_file_location("torchvision_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # keeps the operators that it declares
    spec.loader.exec_module(module)
    return module


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """``torchvision.ops.nms``, in Python."""
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        order = order[1:][box_iou(boxes[order[:1]], boxes[order[1:]])[0] <= iou_threshold]
    return torch.stack(kept) if kept else order


def main() -> None:
    if importlib.util.find_spec("torchvision"):
        torchvision_models().models()
        import torchvision

        if not torchvision.extension._has_ops():
            torchvision.ops.nms = nms
    arguments = sys.argv[1:]
    if arguments[0] == "--without-fusedconvbn":
        assert not [name for name in sys.modules if name.split(".")[0] == "fusedconvbn"]
        sys.modules["fusedconvbn"] = None  # an import of it fails
        del arguments[0]
    sys.argv = arguments
    warnings.filterwarnings("error", message="fuse: |a fused .* runs unfused")
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
