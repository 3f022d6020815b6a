"""Makes TorchDynamo capture a model: its settings, the frame at which it begins, and what it
captures of batch norms."""

import functools
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._dynamo.types import ConvertFrameReturn
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from .. import memory
from ..batch_norm import batch_norm_attributes, batch_norm_call
from ..synchronised import group_name_of
from .calls import normalise
from .nodes import value

# While a fused model is captured:
# - hooks that are registered later are guarded,
# - numpy draws its own random numbers,
# - numbers and sizes that depend on values break the graph,
# - no model runs out of recompilations in the middle of a training,
# - DDP's buckets do not cut the graph.
_SETTINGS = {
    "skip_nnmodule_hook_guards": False,
    "use_numpy_random_stream": True,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "recompile_limit": 256,
    "accumulated_recompile_limit": 65536,
    "optimize_ddp": False,
}

_VALUES = "it takes numbers or sizes out of tensors, as x.item() does"

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

torch._dynamo.allow_in_graph(normalise)
_capturing = 0
_lock = threading.RLock()  # one thread at a time replaces the forwards


def is_capturing() -> bool:
    """Whether a fused model is being captured, as opposed to a compiler's graph that the model is a
    part of."""
    return _capturing > 0


is_capturing._dynamo_marked_constant = True


def _forward(self: nn.Module, input: Tensor) -> Tensor:
    """What is captured in place of `_BatchNorm.forward` and `SyncBatchNorm.forward`. The former
    breaks the graph at ``float(num_batches_tracked)``, the latter at collectives and, on CPU, at an
    error."""
    synchronised = isinstance(self, nn.SyncBatchNorm)
    counts = self.training and self.track_running_stats and self.num_batches_tracked is not None
    one_sided = (self.running_mean is None) != (self.running_var is None)
    if (not synchronised and not (counts and self.momentum is None)) or one_sided:
        return _batch_norm_forward(self, input)
    self._check_input_dim(input)
    if synchronised:
        self._check_non_zero_input_channels(input)
    training, momentum, mean, var, counter = batch_norm_call(*batch_norm_attributes(self))
    return normalise(
        input, mean, var, counter, self.weight, self.bias, training, momentum, self.eps
    )


_batch_norm_forward = _BatchNorm.forward
_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
)


def _only_watches(hook: Any) -> bool:
    """Whether a hook on all modules only records which module runs, as a FLOP counter's does. Such
    a hook would break the graph at each module."""
    return getattr(hook, "__module__", "") in (
        "torch.utils.module_tracker",
        "fusedconvbn.recompute_check",
    )


def global_hooks() -> list[Any]:
    """The hooks on all modules that are captured. Dynamo does not guard them."""
    return [hook for hooks in _GLOBAL_HOOKS for hook in hooks.values() if not _only_watches(hook)]


@contextmanager
def _captures() -> Iterator[None]:
    global _capturing
    with _lock, ExitStack() as stack:
        watching = [
            (hooks, key, hook)
            for hooks in _GLOBAL_HOOKS
            for key, hook in hooks.items()
            if _only_watches(hook)
        ]
        forwards = {kind: kind.forward for kind in (_BatchNorm, nn.SyncBatchNorm)}
        stack.enter_context(torch._dynamo.config.patch(_SETTINGS))
        # Dynamo captures nothing under a mode, such as a FLOP counter.
        stack.enter_context(_disable_current_modes())
        _capturing += 1
        try:
            for kind in forwards:
                kind.forward = _forward
            for hooks, key, _ in watching:
                del hooks[key]
            yield
        finally:
            _capturing -= 1
            for hooks, key, hook in watching:
                hooks[key] = hook
            for kind, forward in forwards.items():
                kind.forward = forward


def _root(
    model: nn.Module, version: str, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    if version:  # read, so that Dynamo guards it and another version is captured anew
        return forward(model, *args, **kwargs)


def captured(
    backend: Backend, *, whole: bool = False, dynamic: bool | None = None
) -> Callable[..., Any]:
    """``_root`` with what it calls captured by Dynamo and run by `backend`.

    Args:
        backend: of Dynamo.
        whole: raise an error at what breaks the graph.
        dynamic: as in ``torch.compile``.
    """
    # Each model has a code object of its own, as Dynamo counts recompilations by code object.
    own = types.FunctionType(_root.__code__.replace(), _root.__globals__)
    # Dynamo never frees a backend, and with it all that the backend refers to.
    alive = weakref.ref(backend)
    context = torch._dynamo.optimize(
        lambda module, inputs: alive()(module, inputs), nopython=whole, dynamic=dynamic
    )
    convert = context.callback

    # Dynamo calls this only where it captures something.
    @functools.wraps(convert)
    def convert_with_settings(frame: Any, *args: Any, **kwargs: Any) -> Any:
        if frame.f_code.co_filename == memory.__file__:  # a hook that counts saved bytes
            return ConvertFrameReturn()
        with _captures():
            return convert(frame, *args, **kwargs)

    context.callback = convert_with_settings
    call = context(own)
    call.backend = backend
    return call


def paths_of(model: nn.Module) -> dict[str, str]:
    """The path of each module, by its id as captured graphs write it."""
    return {str(id(module)): path for path, module in model.named_modules()}


def groups_of(model: nn.Module) -> Mapping[str, str]:
    """The name of each synchronised batch norm's process group, by the id of the module."""
    groups = {str(id(module)): group_name_of(module) for module in model.modules()}
    return {module: group for module, group in groups.items() if group}


class _Stop(BaseException):
    """Ends a capture before anything of the model has run."""


def capture_whole(
    model: nn.Module, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, list[Any]] | dict[str, str]:
    """The graph of a model's forward, and the graph's inputs; or, where the graph breaks, the place
    and the reason. Nothing of the model runs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((module, list(example_inputs)))
        raise _Stop

    try:
        captured(backend, whole=True, dynamic=False)(model, "0", forward, tuple(args), dict(kwargs))
    except _Stop:
        # Asked for a whole graph, Dynamo captures calls that break the graph otherwise.
        if any(_depends_on_values(value(node)) for node in found[0][0].graph.nodes):
            return {"": _VALUES}
        return found[0]
    except torch._dynamo.exc.TorchDynamoException as error:
        return _where_and_why(error)
    except GuardOnDataDependentSymNode:
        return {"": _VALUES}
    return {"": "it computes nothing with tensors"}


def _depends_on_values(t: Any) -> bool:
    symbolic = isinstance(t, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))
    return symbolic and bool(free_unbacked_symbols(t))


def _where_and_why(error: Any) -> dict[str, str]:
    libraries = tuple(os.path.dirname(module.__file__) for module in (torch, memory))
    stack = getattr(error, "real_stack", None) or ()
    frames = [f for f in stack if not f.filename.startswith(libraries)]
    where = f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    lines = [line.strip() for line in str(error).split("\n")]
    explanation = next((line for line in lines if line.startswith("Explanation: ")), "")
    return {
        where: " ".join(filter(None, (lines[0] + ".", explanation.removeprefix("Explanation: "))))
    }
