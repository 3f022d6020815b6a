"""Training steps that are repeated with a tighter plan where memory runs out."""

import contextlib
import functools
import gc
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from ..memory import empty_cache
from .api import is_fused, uncompiled, unfuse
from .plan import Memory, Peak, Plan
from .random_states import random_states

P = ParamSpec("P")
R = TypeVar("R")
_LESS = 0.7  # of what the last plan saves: the budget of the next
_SIGNS = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")


def rescue(
    model: nn.Module, step: Callable[P, R], *, also: Sequence[nn.Module] = ()
) -> Callable[P, R]:
    """A training step that survives where memory runs out: the model's plan is tightened, and the
    step runs again, with the same batch.

    The next plan saves at most 0.7 of what the last one saves for backward. Below what ``"min"``
    saves it is the plan with the lowest peak, the last one. A plan stays for all later steps. Each
    change takes the seconds of a new capture, and is told in a warning, which has the share to give
    to :func:`fusedconvbn.fuse` the next time. (A model inside ``torch.compile`` has no segments, so
    there it saves no less than with ``"min"``.)

    Before it is repeated, what the step has changed is as it was: buffers, gradients, and the
    states of Python's, NumPy's and torch's random numbers. So the results are those of a step that
    had enough memory. A copy of the buffers is made before each step.

    Args:
        model: made by :func:`fusedconvbn.fuse` with ``example_inputs``. It is fused anew in place.
        step: forward and backward, and the optimizer's step if you like. What it does beside that
            happens again, unnoticed: it should be given its batch, not take it from an iterator,
            and write to parameters by an optimizer, not by ``.data``.
            ``optimizer.zero_grad()`` may be at its beginning; it may not add to gradients of an
            earlier step, which is noticed unless ``create_graph=True``. A ``GradScaler`` is not
            brought back: behind its ``unscale_`` a step cannot be repeated.
        also: other modules whose gradients or buffers the step changes.

    Returns:
        A function of the arguments of ``step``.

    Raises:
        ValueError: ``model`` was not made by ``fuse`` with ``example_inputs``.

    The function raises what ``step`` raises. That is the error of the allocator, with the reason
    added, where the last plan does not fit, or where the step cannot be undone: an optimizer had
    begun its step; a parameter, an argument or an older gradient was changed in place; a process
    group is in use, whose other processes may wait; or the model cannot be planned from shapes.

    Example:
        >>> model = fusedconvbn.fuse(model, images, memory=1.0)  # the fastest plan
        >>> def step(images, labels):
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(images), labels)
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> step = fusedconvbn.rescue(model, step)
    """
    model = uncompiled(model)
    fusion: Any = model._fusion if is_fused(model) else None
    if fusion is None or fusion.example is None:
        found = "one that was fused without example_inputs" if fusion else "an unfused one"
        if not fusion and any(map(is_fused, model.modules())):
            found = "one that has it inside, as its module"
        raise ValueError(
            "rescue: expected a model that fuse made with example_inputs, got "
            f"{found} ({type(model).__name__})"
        )
    modules = [model, *also]
    is_last = False  # whether there is no tighter plan

    @functools.wraps(step)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal is_last
        while True:
            before = _Before(modules, (args, kwargs))
            # Lists and dicts of their own, from which the step may take things.
            own_args, own_kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
            hook = register_optimizer_step_pre_hook(before.optimizer_begins)
            try:
                return step(*own_args, **own_kwargs)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = "no plan needs less memory" if is_last else before.what_stays()
                if reason:
                    _add(error, reason)
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold tensors of the step
                failure = error
            finally:
                hook.remove()
            del own_args, own_kwargs
            before.restore()
            try:
                _free()
                is_last = _tighten(model)
            except Exception as error:
                reason = f"the model cannot be planned again: {error}"
                _add(failure, reason)
                raise failure from error
            finally:
                del failure

    return run


def _add(error: Exception, reason: str) -> None:
    error.args = (f"{error}\nrescue: the step is not repeated: {reason}",)


def _free() -> None:
    gc.collect()
    empty_cache()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_out_of_memory(error: BaseException) -> bool:
    is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_known or any(sign in str(error) for sign in _SIGNS)


def _tighten(model: nn.Module) -> bool:
    """Fuses a model anew, such that it saves less; whether there is no tighter plan than that."""
    from .find import decide, find  # imports TorchDynamo
    from .model import fused

    fusion: Any = model._fusion
    args, kwargs = fusion.example
    share: float = fusion.plan.share
    with contextlib.ExitStack() as context:
        for kind, dtype in fusion.plan.autocast.items():
            context.enter_context(torch.autocast(kind, dtype))
        found = find(model, args, kwargs, "min", False)
        is_last = _LESS * share * found.eager <= found.least
        memory: Memory = "min"
        if not is_last:
            memory = _LESS * share
        elif found.curve is not None:
            memory = Peak(found.curve.lowest().peak)
        parts = found.plan.parts
        found.plan = Plan(memory)
        found.plan.parts = parts
        decide(found)
    warnings.warn(
        "rescue: a step ran out of memory; it runs again with a plan that saves "
        f"{found.plan.share:.2f} of eager's bytes for backward, instead of {share:.2f}",
        stacklevel=3,
    )
    fused(unfuse(model, inplace=True), found.plan, fusion.example)
    return is_last


class _Before:
    """What a training step may change, as it was before it.

    Args:
        modules: whose parameters, gradients and buffers may change.
        arguments: of the step.
    """

    def __init__(self, modules: Sequence[nn.Module], arguments: Any) -> None:
        every = list(nn.ModuleList(modules).modules())
        parameters = [p for m in every for p in m._parameters.values() if p is not None]
        tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        tensors = [*parameters, *(t for t in tensors if not t.is_inference())]  # without a version
        self._unchanged = [(t, t._version) for t in tensors]
        # A reference to the gradient itself would keep zero_grad from freeing it.
        leaves = [t for t in tensors if t.is_leaf and t.requires_grad]
        self._grads = [(t, _identity(t.grad), _version(t.grad)) for t in leaves]
        self._owners = [(m._buffers, dict(m._buffers)) for m in every if m._buffers]
        buffers = [t for _, owned in self._owners for t in owned.values() if t is not None]
        # An expanded one cannot be written to. A batch norm does not count its writes as versions.
        self._buffers = [t for t in buffers if not _is_expanded(t)]
        self._copies = [torch.empty_like(t) for t in self._buffers]
        _copy(self._buffers, self._copies)
        self._restore_random = random_states({t.device for t in tensors})
        self._optimizer_began = False

    def optimizer_begins(self, *_: Any) -> None:
        self._optimizer_began = True

    def what_stays(self) -> str:
        """What cannot be undone; nothing if all can."""
        if self._optimizer_began:
            return "an optimizer had begun its step"
        if any(t._version != version for t, version in self._unchanged):
            return "a parameter or an argument of the step was changed in place"
        for t, identity, version in self._grads:
            if _is(t.grad, identity) and _version(t.grad) != version:
                return "a gradient of an earlier step was changed in place"
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return "other processes of a group may wait for this one"
        return ""

    def restore(self) -> None:
        for t, identity, _ in self._grads:
            if not _is(t.grad, identity):
                t.grad = None
        for owner, owned in self._owners:
            owner.clear()
            owner.update(owned)
        _copy(self._copies, self._buffers)
        self._restore_random()


def _identity(grad: Tensor | None) -> StorageWeakRef | None:
    if grad is None:
        return None
    return StorageWeakRef((grad._values() if grad.is_sparse else grad).untyped_storage())


def _is(grad: Tensor | None, identity: StorageWeakRef | None) -> bool:
    return grad is not None and identity is not None and _identity(grad) == identity


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version


def _is_expanded(t: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """With a launch for each type, not for each tensor."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for source, target in zip(sources, targets, strict=True):
        into, out_of = groups[source.dtype, source.device]
        into.append(target)
        out_of.append(source)
    with torch.no_grad():
        for into, out_of in groups.values():
            torch._foreach_copy_(into, out_of)
