"""A debug switch: checks that the feature maps recomputed in backward are those of forward."""

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
    """The modules whose forward is running in this thread, outermost first, and the names of the
    outermost module's descendants."""

    def __init__(self) -> None:
        self.stack: list[nn.Module] = []
        self.names: dict[nn.Module, str] = {}


_running = _Running()


def _announce() -> None:
    """Tells the operators the name of the module whose forward runs them."""
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
    """Checks in every later backward that the recomputed feature maps are those of forward.

    The batch statistics of each recomputed map are computed again and compared with those saved in
    forward. They differ when the input or the weight was written to in between in a way that
    autograd's version check does not see: through ``.data``, or through shared memory. The check
    costs one more pass over each map; it is meant for debugging.

    The check allows for rounding: that of another algorithm for the same convolution, which cuDNN
    may choose in backward, and that of TF32 where it is enabled; a change is then found only if it
    is larger than 2⁻⁹ (the page "Debugging" has the bounds). A change that leaves the mean and the
    variance of each channel as they were, such as a write to γ, is not found.

    An error names the layer if the check was on during its forward. A call of
    :func:`fusedconvbn.conv_bn` has the name of the module that calls it, a scripted model that of
    the module called from Python; compiled code has no name.

    Args:
        enabled: whether to switch the check on or off.

    Raises:
        RuntimeError: in backward, with the name of the layer in the outermost module that was
            called.

    Example:
        >>> fusedconvbn.check_recompute(True)
        >>> loss = model(x).sum()
        >>> x.data.zero_()
        >>> loss.backward()
        RuntimeError: check_recompute: layer1.0.conv1: the statistics of 64 of 64 channels are not
        those of forward. …
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
