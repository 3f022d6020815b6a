"""A debug switch: are the feature maps that backward remakes those of forward?"""

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

_enabled = False
_hooks: list[Any] = []


class _Running(threading.local):
    """The modules whose forward is running in this thread, outermost first, and the names of their descendants."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.names: dict[nn.Module, str] = {}


_running = _Running()


def _enter(module: nn.Module, _: Any) -> None:
    if not _running.stack:
        _running.names = {child: name for name, child in module.named_modules()}
    _running.stack.append(module)


def _leave(module: nn.Module, *_: Any) -> None:
    while _running.stack and _running.stack.pop() is not module:
        pass


def check_recompute(enabled: bool = True) -> None:
    """Checks in every backward from now on that what is remade there is what forward had.

    The batch statistics of each remade feature map are computed again and compared with those saved in forward. They differ
    when the input or the weight was written to in between, and autograd's version check does not see a write to ``.data``
    or through memory that is shared. Costs one more pass over each map; for debugging.

    Only calls of forward made while it is on know the name of their layer. Compiled code has none.

    Args:
        enabled: on, or off again.

    Raises:
        RuntimeError: in backward, with the name of the layer in the outermost module that was called.

    Example:
        >>> fusedconvbn.check_recompute(True)
        >>> loss = model(x).sum()
        >>> x.data.zero_()
        >>> loss.backward()
        RuntimeError: check_recompute: layer1.0.conv1: the statistics of 64 of 64 channels are not those of forward. …
    """
    global _enabled
    _enabled = enabled
    torch.ops.fusedconvbn._check_recompute(enabled)
    while _hooks:
        _hooks.pop().remove()
    if enabled:
        _running.stack.clear()
        _hooks.append(register_module_forward_pre_hook(_enter))
        _hooks.append(register_module_forward_hook(_leave, always_call=True))


def announce(layer: nn.Module) -> None:
    """Tells the operators in whose forward they run."""
    if _enabled and not torch.compiler.is_compiling():
        name = _running.names.get(layer) or type(layer).__name__
        torch.ops.fusedconvbn._set_layer_name(name)
