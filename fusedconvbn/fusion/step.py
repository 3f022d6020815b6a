"""The memory of a training step of a captured graph, without computing its values."""

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..chain import Norm, pack
from ..memory import saved_storages
from .chain_stand_in import Backward, chain_forward
from .profile import device_of
from .workspaces import workspace

_aten, _ops = torch.ops.aten, torch.ops.fusedconvbn


@dataclass(frozen=True)
class StepMemory:
    """The memory of a training step, in bytes, as :func:`fusedconvbn.track_memory` measures it.
    What was there before the step, as parameters, buffers and inputs, does not count.

    Attributes:
        saved: distinct storages that autograd saves for backward.
        end_of_forward: live just before backward.
        peak: the most that is live at any moment. Gradients of parameters count.
        forward, backward: of each chain, in order: the indices of those of the graph's inputs that
            it reads, and the most that is live between the end of the one before it and its own.
    """

    saved: int
    end_of_forward: int
    peak: int
    forward: list[tuple[frozenset[int], int]]
    backward: list[tuple[frozenset[int], int]]


def step_memory(module: fx.GraphModule, example_inputs: Sequence[Any]) -> StepMemory:
    """The memory of the forward of a graph, and of the backward of the sum of its results, run with
    stand-ins for its tensors. Gradients of parameters stay; before the step there are none.

    On a CPU what oneDNN allocates is known by rules (`workspaces.py`). On CUDA each storage is
    rounded up to 512 bytes, and cuDNN's workspaces are measured (`cuda_libraries.py`). The caching
    allocator counts up to 1.2 % more than its requests, as it does not split a block of which less
    than 1 MiB would be left.

    Args:
        module: the module of a :class:`Graph`, or an unfused graph whose checkpoints run
            (:func:`run_checkpoints`).
        example_inputs: those that Dynamo gives a backend.

    Under autocast the forward runs under it, and backward does not.
    """
    device = device_of(example_inputs)
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), _Live(device)
    inputs = [stand_in(t, mode) for t in example_inputs]
    for t in inputs:
        if isinstance(t, Tensor):
            live.leave_out(t)
    with mode, live, saved_storages(device) as storages:
        loss = loss_of(module(*inputs))
        torch.clear_autocast_cache()  # as the end of autocast does, which backward is outside of
        saved, end_of_forward = sum(storages.values()), live.now
        if loss.requires_grad:
            kind = device.type if device.type == "cuda" else "cpu"
            with torch.autocast(kind, enabled=False):
                loss.backward()
    at = {t.untyped_storage()._cdata: i for i, t in enumerate(inputs) if isinstance(t, Tensor)}
    chains = [[(frozenset(at[s] for s in r & at.keys()), n) for r, n in c] for c in live.chains]
    return StepMemory(saved, end_of_forward, live.peak, *chains)


def stand_in(t: Any, mode: FakeTensorMode) -> Any:
    if isinstance(t, torch.SymInt):
        return _hint(t)
    if not isinstance(t, Tensor):
        return t
    with mode:
        size, stride = ([_hint(n) for n in numbers] for numbers in (t.size(), t.stride()))
        other = torch.empty_strided(size, stride, dtype=t.dtype, device=t.device)
    return other.requires_grad_(t.requires_grad)


def _hint(n: Any) -> Any:
    """A number; of a symbolic one, the value that it had in the capture."""
    return n.node.hint if isinstance(n, torch.SymInt) else n


def loss_of(result: Any) -> Tensor:
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
    return sum((t.sum() for t in tensors if t.requires_grad), torch.zeros(()))


class _Live(TorchDispatchMode):
    """Counts the storages that are live.

    Attributes:
        now, peak: bytes.
        chains: of the forward and of the backward of each chain, the storages that it reads, and
            the peak since the end of the one before it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now = self.peak = self._recent = 0
        self.chains: tuple[list[tuple[set[int], int]], ...] = ([], [])
        self._alone = _uses_of_a_gradient()
        self._unit = 512 if device.type == "cuda" else 1  # of the allocator
        self._bytes: dict[int, int] = {}  # of the storages that are live, by their identity
        self._references: dict[int, weakref.ref[Any]] = {}

    def leave_out(self, t: Tensor) -> None:
        self._add(t, 0)

    def _add(self, t: Tensor, nbytes: int) -> None:
        storage = t.untyped_storage()
        key = storage._cdata

        def freed(_: Any) -> None:
            self.now -= self._bytes.pop(key)
            del self._references[key]

        self._bytes[key] = nbytes
        self._references[key] = weakref.ref(storage, freed)
        self.now += nbytes

    def _move(self, t: Tensor) -> tuple[Tensor, bool]:
        """The gradient that a chain's backward is given, and whether it may be overwritten. The
        kernel is the only owner of a gradient that nobody else has, and may free it: another tensor
        takes its bytes."""
        if _uses(t) != self._alone:
            return t, False
        other = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
        key = t.untyped_storage()._cdata
        nbytes = self._bytes.get(key, 0)
        self._bytes[key] = 0
        self.now -= nbytes
        self._add(other, nbytes)
        return other, t.is_cpu

    def _ended(self, direction: int, tensors: Sequence[Tensor], result: Any) -> Any:
        read = {t.untyped_storage()._cdata for t in tensors}
        self.chains[direction].append((read, self._recent))
        self._recent = self.now
        return result

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args)
        if func is _ops._chain_forward.default:
            with self:
                result = chain_forward(*args, **kwargs)
            return self._ended(0, args[0], result)
        if func is _ops._chain_backward.default:
            backward = Backward(*args[1:], **kwargs)
            backward.grad, backward.owned = self._move(args[0])
            with self:
                result = backward.run()
            return self._ended(1, args[1], result)
        result = func(*args, **kwargs)
        if func is _aten.native_batch_norm.default and args[0].dtype.itemsize == 2:
            result = (result[0], result[1].float(), result[2].float())  # the stand-ins are not
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._bytes:
                self._add(t, -(-t.untyped_storage().nbytes() // self._unit) * self._unit)
        self._recent = max(self._recent, self.now + workspace(func, args, kwargs, result))
        self.peak = max(self.peak, self._recent)
        return result


def _uses(t: Tensor) -> tuple[int, int]:
    """How many refer to a tensor and to its storage."""
    return t._use_count(), torch._C._storage_Use_Count(t.untyped_storage()._cdata)


@functools.cache
def _uses_of_a_gradient() -> tuple[int, int]:
    """:func:`_uses` of a gradient that nobody else has, where a mode sees it."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is _ops._chain_backward.default:
                found.append(_uses(args[0]))
            return func(*args, **(kwargs or {}))

    with torch.enable_grad(), FakeTensorMode(), Watch():
        x = torch.ones(2, 3, 4, 4, requires_grad=True)
        packed = pack(x, [Norm()])
        (_ops._chain_forward(packed.tensors, *packed.options, [])[0] * 2).sum().backward()
    return found[0]
