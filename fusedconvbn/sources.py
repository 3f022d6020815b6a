"""Models by the names that the command line takes, and models without memory."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SourceFileLoader
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


def split(source: str) -> tuple[str, str]:
    """Where a source is, and the name of what makes the model there.

    Raises:
        ValueError: the source is none of those in `SOURCES`.
    """
    where, _, name = source.rpartition(":")
    if not where or not name:
        raise ValueError(f"expected a source like {SOURCES}, got {source!r}")
    return where, name


def factory_of(source: str) -> Callable[[], nn.Module]:
    """What makes the model that a `source` names, with random weights.

    Raises:
        ValueError: the source is none of those in `SOURCES`, does not exist, or fails.
        ImportError: the module is not installed.
    """
    where, name = split(source)
    if where == "torchvision":
        builder = _builder(name)
        weights = {"weights", "weights_backbone"} & {*inspect.signature(builder).parameters}
        return partial(builder, **dict.fromkeys(weights))
    if where == "timm":
        timm = _timm()
        if not timm.is_model(name):
            raise ValueError(_no_model("timm", name, timm.list_models()))
        return partial(timm.create_model, name)
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        found = "nothing of this name" if factory is None else type(factory).__name__
        raise ValueError(f"expected {name!r} in {where} to be a function or class, got {found}")
    if needed := _needed(factory):
        raise ValueError(
            f"expected {source} to need no arguments, got one that needs {', '.join(needed)}: "
            "name a function that passes them"
        )

    def checked() -> nn.Module:
        try:
            model = factory()
        except Exception as error:
            raise ValueError(failure(source, error)) from error
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"expected {source} to return an nn.Module, got {type(model).__name__}"
            )
        return model

    return checked


def sample_of(source: str) -> tuple[int, ...]:
    """The shape of a sample, without the batch, for the model that a `source` names: where its
    library says nothing else, an image of 224²."""
    where, name = split(source)
    if where == "torchvision":
        size = 299 if "inception" in name else 224  # its auxiliary classifier needs it
        return (3, 16, size, size) if _task(name) == "video" else (3, size, size)
    config = _timm().get_pretrained_cfg(name) if where == "timm" else None
    return tuple(config.input_size) if config else (3, 224, 224)


def takes_a_batch(source: str) -> bool:
    """Whether the model takes one tensor, as far as is known."""
    where, name = split(source)
    return where != "torchvision" or _task(name) not in ("detection", "optical_flow")


def inputs_of(source: str, batch: int, sample: Sequence[int]) -> tuple[Any, ...]:
    """Arguments for the forward of the model that a `source` names: a batch of samples, which are
    random. torchvision's detectors take a list of images and a list of what is in them, and its
    optical flow two batches."""
    if takes_a_batch(source):
        return (torch.rand(batch, *sample),)
    if _task(split(source)[1]) == "optical_flow":
        return torch.rand(batch, *sample), torch.rand(batch, *sample)
    height, width = sample[-2:]
    objects = [
        {
            "boxes": torch.tensor([[0.2 * width, 0.2 * height, 0.8 * width, 0.8 * height]]),
            "labels": torch.ones(1, dtype=torch.int64),
            "masks": torch.ones(1, height, width, dtype=torch.uint8),
            "keypoints": torch.tensor([width / 2, height / 2, 1.0]).expand(1, 17, 3),
        }
        for _ in range(batch)
    ]
    return [torch.rand(*sample) for _ in range(batch)], objects


def failure(what: str, error: BaseException) -> str:
    """That something of the user raised an error, on one line."""
    said = textwrap.shorten(str(error), 400, placeholder=" …")
    return f"{what} raised {type(error).__name__}{f': {said}' if said else ''}"


def _builder(name: str) -> Callable[..., nn.Module]:
    """torchvision's function that makes a model."""
    with _failing("torchvision"):
        models = _torchvision.models()
    if name not in models.list_models():
        raise ValueError(_no_model("torchvision", name, models.list_models()))
    builder: Callable[..., nn.Module] = models.get_model_builder(name)
    return builder


def _task(name: str) -> str:
    """What a model of torchvision is for: "detection", "optical_flow", "quantization",
    "segmentation", "video", or "" for a classifier."""
    folders = _builder(name).__module__.split(".")[2:-1]
    return folders[0] if folders else ""


def _no_model(library: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known)
    meant = f"; it has {', '.join(close)}" if close else ""
    return f"expected a model that {library} has, got {name!r}{meant}"


def _needed(factory: Callable[..., Any]) -> list[str]:
    """The names of the arguments without which a function cannot be called."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a function without a signature
        return []
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in given]


def _timm() -> Any:
    with _failing("timm"):
        _torchvision.models()  # timm imports it
        return importlib.import_module("timm")


def _module(where: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _failing(where):
        return importlib.import_module(where)


def _file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"expected the file of a source to exist, got {str(path)!r}")
    loader = SourceFileLoader(path.stem, str(path.absolute()))
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute(), loader=loader)
    assert spec is not None  # with a loader
    module = importlib.util.module_from_spec(spec)
    # As `python path` does: the folder of the file is searched, and the file is a module.
    sys.path.insert(0, str(path.parent))
    sys.modules.setdefault(path.stem, module)
    with _failing(str(path)):
        loader.exec_module(module)
    return module


@contextmanager
def _failing(where: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(f"the import of {where} failed: {error}") from error
    except Exception as error:
        raise ValueError(failure(f"the import of {where}", error)) from error


class _StandIns(TorchDispatchMode):
    """While it is active, tensors with more than some thousand values are made without memory, as
    stand-ins of `mode`. A value that is read from one is 0. Small tensors have values, as
    constructors read them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
