"""Loads the operators; where they do not load, an error says why in a sentence."""

import sys
from pathlib import Path
from typing import Any

import torch

_REBUILD = (
    "run `pip install --force-reinstall --no-deps .` in the fusedconvbn sources to build it again"
)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def build_info() -> dict[str, Any]:
    """The facts of the build: `torch`, `cuda`, `cuda_architectures`, `compiler`,
    `instruction_sets`.

    Needs only the small module `_C`, and so works where the operators do not load, too.
    """
    try:
        from . import _C  # type: ignore[attr-defined]  # compiled
    except ImportError as error:
        what = f"fusedconvbn in {Path(__file__).parent} is not built"
        built = [path for path in sys.path if any(Path(path, "fusedconvbn").glob("_C*.so"))]
        if built:  # behind the folder that `python -m` and `python -c` search first
            raise ImportError(
                f"{what}, and hides the one that is installed in {built[0]}: start Python in "
                "another folder, or type `fusedconvbn` instead of `python -m fusedconvbn`"
            ) from None
        raise ImportError(
            f"{what} ({error}); run `pip install .` in its sources, and import it from another "
            "folder than the sources"
        ) from None
    facts: dict[str, Any] = _C.build_info()
    return facts


def load() -> None:
    """Registers `torch.ops.fusedconvbn`.

    Raises:
        ImportError: the library is missing, or was built against another minor version of torch.
    """
    built = build_info()["torch"]
    if _minor(built) != _minor(torch.__version__):
        raise ImportError(
            f"fusedconvbn was built against torch {built}, found torch {torch.__version__}; "
            f"install its wheel for torch {'.'.join(_minor(torch.__version__))}, or {_REBUILD}, or "
            f'return to that torch by `pip install "torch=={".".join(_minor(built))}.*"`'
        )
    library = Path(__file__).with_name("_ops.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"fusedconvbn, built against torch {built}, does not load with torch "
            f"{torch.__version__} ({error}); {_REBUILD}"
        ) from error
