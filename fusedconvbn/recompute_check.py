"""A debug switch: are the feature maps that backward remakes those of forward?"""

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

_hooks: list[Any] = []


class _Running(threading.local):
    """The modules whose forward is running in this thread, outermost first, and the names of their descendants."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.names: dict[nn.Module, str] = {}


_running = _Running()


def _announce() -> None:
    """Tells the operators in whose forward they run."""
    name = ""
    if _running.stack:
        module = _running.stack[-1]
        kind = getattr(module, "original_name", type(module).__name__)  # of a scripted module
        name = _running.names.get(module) or kind
    torch.ops.fusedconvbn._set_layer_name(name)


def _enter(module: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if not _running.stack:
        _running.names = {child: name for name, child in module.named_modules()}
    _running.stack.append(module)
    _announce()


def _leave(module: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    while _running.stack and _running.stack.pop() is not module:
        pass
    if not _running.stack:
        _running.names = {}
    _announce()


def check_recompute(enabled: bool = True) -> None:
    """Checks in every backward from now on that what is remade there is what forward had.

    The batch statistics of each remade feature map are computed again and compared with those saved in forward. They differ
    when the input or the weight was written to in between, and autograd's version check does not see a write to ``.data``
    or through memory that is shared. Costs one more pass over each map; for debugging.

    Rounding is allowed for, also that of another algorithm for the same convolution, which cuDNN may take in backward, and
    of TF32 where that is allowed: a change must then be larger than 2⁻⁹ (docs/debugging.md has the bounds).

    What changes no mean and no variance of a channel, as a write to γ, is not found. Only calls of forward made while it
    is on know the name of their layer; a call of :func:`fusedconvbn.conv_bn` has that of the module that makes it, a
    scripted model that of the module called from Python, compiled code has none.

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
    global _running
    _running = _Running()
    torch.ops.fusedconvbn._set_layer_name("")
    torch.ops.fusedconvbn._check_recompute(enabled)
    while _hooks:
        _hooks.pop().remove()
    if enabled:
        _hooks.append(register_module_forward_pre_hook(_enter))
        _hooks.append(register_module_forward_hook(_leave, always_call=True))
