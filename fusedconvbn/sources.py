"""Models by the names that the command line takes, and models without memory."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import _torchvision

SOURCES = "torchvision:NAME, timm:NAME, package.module:FACTORY or path/to/file.py:FACTORY"
_SMALL = 4096  # values that a constructor may want to read, such as rates for each layer


def factory_of(source: str) -> Callable[[], nn.Module]:
    """What makes the model that a `source` names, with random weights.

    Raises:
        ValueError: the source is none of those in `SOURCES`, or does not exist.
        ImportError: the module is not installed.
    """
    where, colon, name = source.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"expected a source like {SOURCES}, got {source!r}")
    if where == "torchvision":
        models = _torchvision.models()
        if name not in models.list_models():
            raise ValueError(f"expected a model that torchvision has, got {name!r}")
        builder = models.get_model_builder(name)
        weights = {"weights", "weights_backbone"} & {*inspect.signature(builder).parameters}
        return partial(builder, **dict.fromkeys(weights))
    if where == "timm":
        _torchvision.models()  # timm imports it
        timm = importlib.import_module("timm")
        if not timm.is_model(name):
            raise ValueError(f"expected a model that timm has, got {name!r}")
        return partial(timm.create_model, name)
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        found = "nothing of this name" if factory is None else type(factory).__name__
        raise ValueError(f"expected {name!r} in {where} to be a function or class, got {found}")

    def checked() -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"expected {source} to return an nn.Module, got {type(model).__name__}"
            )
        return model

    return checked


def _module(where: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(where)


def _file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"expected the file of a source to exist, got {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # As `python path` does: the folder of the file is searched, and the file is a module.
    sys.path.insert(0, str(path.parent))
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


class _StandIns(TorchDispatchMode):
    """While it is active, tensors with more than some thousand values are made without memory, as
    stand-ins of `mode`. A value that is read from one is 0. Small tensors have values, as
    constructors read them."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(isinstance(t, FakeTensor) for t in given):
            if given:
                return func(*args, **kwargs)
            with self.mode:
                made = func(*args, **kwargs)
            small = not isinstance(made, Tensor) or made.numel() <= _SMALL
            return func(*args, **kwargs) if small else made
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=given[0].dtype).item()
        with self.mode:
            return func(*args, **kwargs)


def without_memory(factory: Callable[[], nn.Module]) -> nn.Module:
    """A model whose larger parameters and buffers are stand-ins."""
    with _StandIns(), torch.device("cpu"):
        return factory()
