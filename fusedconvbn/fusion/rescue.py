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
    to :func:`fusedconvbn.fuse` the next time.

    Before it is repeated, what the step has changed is as it was: buffers, gradients, and the
    states of Python's, NumPy's and torch's random numbers. So the results are those of a step that
    had enough memory. A copy of the buffers is made before each step.

    Args:
        model: made by :func:`fusedconvbn.fuse` with ``example_inputs``. It is fused anew in place.
        step: forward and backward, and the optimizer's step if you like. What it does beside that
            happens again: it should be given its batch, not take it from an iterator. It may not
            add to gradients of an earlier step; ``optimizer.zero_grad()`` may be at its beginning.
        also: other modules whose gradients or buffers the step changes.

    Returns:
        A function of the arguments of ``step``.

    Raises:
        ValueError: ``model`` was not made by ``fuse`` with ``example_inputs``.

    The function raises what ``step`` raises. That is the error of the allocator, with the reason
    added, where the last plan does not fit, or where the step cannot be undone: an optimizer had
    begun its step; a parameter, an argument or an older gradient was changed in place; or other
    processes wait in a collective.

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
        how = "one that was fused without example_inputs" if fusion else "an unfused one"
        raise ValueError(
            "rescue: expected a model that fuse made with example_inputs, got "
            f"{how} ({type(model).__name__})"
        )
    undo = _Undo([model, *also])
    is_last = False  # whether there is no tighter plan

    @functools.wraps(step)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal is_last
        while True:
            undo.begin((args, kwargs))
            hook = register_optimizer_step_pre_hook(undo.optimizer_begins)
            try:
                return step(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = "no plan needs less memory" if is_last else undo.what_stays()
                if reason:
                    error.args = (f"{error}\nrescue: the step is not repeated: {reason}",)
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold tensors of the step
            finally:
                hook.remove()
            undo.restore()
            gc.collect()
            empty_cache()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            is_last = _tighten(model)

    return run


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
        is_last = _LESS * share * found.eager < found.least
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


class _Undo:
    """Brings back the gradients, buffers and random numbers of the time before a training step, if
    the step has changed nothing else."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        every = nn.ModuleList(modules).modules()
        self._owners = [(m._parameters, m._buffers) for m in every if m._parameters or m._buffers]
        self._parameters: list[nn.Parameter] = []
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []  # copies of the buffers

    def begin(self, arguments: Any) -> None:
        """A step with these arguments begins."""
        parameters = [p for ours, _ in self._owners for p in ours.values() if p is not None]
        tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        tensors = [t for t in tensors if not t.is_inference()]  # these have no version
        self._unchanged = [(t, t._version) for t in (*parameters, *tensors)]
        # A reference to the gradient itself would keep zero_grad from freeing it.
        self._grads = [(p, _identity(p.grad), _version(p.grad)) for p in parameters]
        places = [
            (owner, name, t)
            for _, owner in self._owners
            for name, t in owner.items()
            if t is not None
        ]
        self._places = [(owner, name) for owner, name, _ in places]
        buffers = [t for *_, t in places]
        if [*map(id, buffers)] != [*map(id, self._buffers)]:
            self._buffers, self._kept = buffers, [torch.empty_like(t) for t in buffers]
        _copy(self._buffers, self._kept)
        self._restore_random = random_states(parameters[0].device)
        self._optimizer_began = False

    def optimizer_begins(self, *_: Any) -> None:
        self._optimizer_began = True

    def what_stays(self) -> str:
        """What cannot be undone; nothing if all can."""
        if self._optimizer_began:
            return "an optimizer had begun its step"
        if any(t._version != version for t, version in self._unchanged):
            return "a parameter or an argument of the step was changed in place"
        for p, identity, version in self._grads:
            if _is(p.grad, identity) and _version(p.grad) != version:
                return "a gradient of an earlier step was changed in place"
        return "other processes may wait for this one" if _processes() > 1 else ""

    def restore(self) -> None:
        for p, identity, _ in self._grads:
            if not _is(p.grad, identity):
                p.grad = None
        for (owner, name), t in zip(self._places, self._buffers, strict=True):
            owner[name] = t
        _copy(self._kept, self._buffers)
        self._restore_random()


def _processes() -> int:
    distributed = torch.distributed
    is_used = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_used else 1


def _identity(grad: Tensor | None) -> StorageWeakRef | None:
    if grad is None:
        return None
    return StorageWeakRef((grad._values() if grad.is_sparse else grad).untyped_storage())


def _is(grad: Tensor | None, identity: StorageWeakRef | None) -> bool:
    return grad is not None and identity is not None and _identity(grad) == identity


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version


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
