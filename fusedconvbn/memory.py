"""The memory of a training step, from the allocator's own events, and the cache of memory on the
CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["MemoryReport", "empty_cache", "track_memory"]

MIB = 2**20
BACKWARD_NODE = "autograd::engine::evaluate_function"


def empty_cache() -> int:
    """Returns cached memory on the CPU to the system; the result is the number of bytes.

    On the CPU the operators allocate maps of 1 MiB and more from memory that stays with the process
    when a map is freed, as PyTorch does on a GPU: a fresh page costs more than a pass over it. The
    cache is as large as the maps of these operators were at any one time. Call this between
    training and something else that needs memory. Maps in use are not affected. For the memory of a
    GPU, which PyTorch allocates, call :func:`torch.cuda.empty_cache`.
    """
    return int(torch.ops.fusedconvbn._empty_cache())


class MemoryReport:
    """What :func:`fusedconvbn.track_memory` measured; all figures are bytes.

    Attributes:
        end_of_forward: Live just before autograd runs its first backward node, or at the end
            of the context when no backward ran in it.
        peak: The most that was live at any moment.
        saved: Size of the distinct storages that autograd saved for backward.
    """

    end_of_forward: int
    peak: int
    saved: int

    def __getattr__(self, name: str) -> int:
        if name in MemoryReport.__annotations__:
            raise RuntimeError(
                f"track_memory: '{name}' can be read only after the context has ended without an "
                "error, but it has not"
            )
        raise AttributeError(f"'MemoryReport' object has no attribute '{name}'")

    def __str__(self) -> str:
        return (
            f"end of forward {self.end_of_forward / MIB:.2f} MiB, "
            f"peak {self.peak / MIB:.2f} MiB, saved for backward {self.saved / MIB:.2f} MiB"
        )


@contextlib.contextmanager
def track_memory(device: torch.device | str = "cpu") -> Iterator[MemoryReport]:
    """Measures the memory of one training step run inside the context.

    Memory that is allocated inside the context counts until it is freed, so the figures begin at
    zero. Older memory does not count, and freeing it inside changes nothing: the CPU allocator does
    not know the size of a block from before the profiler started. The figures are the allocator's
    (CUDA rounds each block up to 512 bytes); workspaces that a library allocates by itself do not
    show. The gradient that ``loss.backward()`` starts from, one element, belongs to
    ``end_of_forward``.

    ``saved`` counts each storage once however many views of it are saved, leaves out the storages
    of parameters (leaf tensors that require a gradient), and ignores what is saved while a
    backward runs, as when a checkpoint recomputes.

    Args:
        device: ``"cpu"`` or ``"cuda"``, with an index for one GPU only.

    Yields:
        MemoryReport: Can be read once the context has ended.

    Raises:
        ValueError: The device is neither a CPU nor a CUDA device.
        RuntimeError: A profiler is running already, as when two of these contexts are nested.

    The context uses the profiler and saved-tensor hooks, so it cannot surround another profiler or
    a ``torch.func`` transform, and a step in it takes longer.

    Example::

        with track_memory() as memory:
            loss = model(images).sum()
            loss.backward()
        print(memory)
        # end of forward 45.10 MiB, peak 67.71 MiB, saved for backward 44.98 MiB
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"track_memory: device must be a cpu or cuda device, got '{device}'")
    if torch.autograd._profiler_enabled():
        raise RuntimeError("track_memory: no other profiler may run around it, but one does")

    report = MemoryReport()
    with profile(profile_memory=True) as profiler, saved_storages(device) as storages:
        yield report
    events = profiler.kineto_results.experimental_event_tree()
    report.end_of_forward, report.peak = _replay(events, device)
    report.saved = sum(storages.values())


@contextlib.contextmanager
def saved_storages(
    device: torch.device, saw: Callable[[StorageWeakRef, int], None] | None = None
) -> Iterator[dict[StorageWeakRef, int]]:
    """Collects what autograd saves for backward: distinct storages and their bytes. `saw` is called
    with each storage that is saved, as often as it is."""
    # The weak references keep no memory, but as long as they exist no other storage can get the
    # same identity; an address alone could be used again.
    storages: dict[StorageWeakRef, int] = {}

    # Returning the tensor itself would tie an output to its own backward node in a cycle. The
    # version has to be checked here because autograd does not check it for a tensor with hooks.
    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        if _counts(tensor, device):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)
            if saw is not None:
                saw(reference, storage.nbytes())
            storages[reference] = storage.nbytes()
        return tensor.detach(), tensor._version

    def unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "a tensor saved for backward was modified by an inplace operation: it is at "
                f"version {tensor._version}, but backward needs version {version}"
            )
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield storages


def _on(device: torch.device, selected: torch.device) -> bool:
    return device.type == selected.type and selected.index in (None, device.index)


def _counts(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether saving ``tensor`` costs memory: its storage is on the device, and no parameter's."""
    base = tensor if tensor._base is None else tensor._base
    return (
        tensor.layout == torch.strided
        and _on(tensor.device, device)
        and not (base.is_leaf and base.requires_grad)
        and torch._C._current_graph_task_id() == -1  # not inside a backward
    )


def _replay(roots: Sequence[Any], device: torch.device) -> tuple[int, int]:
    """Follows the allocator's events in time; returns bytes at the end of forward and the peak."""
    live: dict[int, int] = {}  # address → bytes, of the blocks that were allocated inside
    total = peak = 0
    end_of_forward = None
    for event in sorted(_flatten(roots), key=lambda event: event.start_time_ns):
        if event.name == "[memory]" and _on(event.extra_fields.device, device):
            block = event.extra_fields
            # The size reported with a free is not used: for a block older than the context it may
            # be the size of an earlier block at the same address.
            total -= live.pop(block.ptr, 0)
            if block.alloc_size > 0:
                live[block.ptr] = block.alloc_size
                total += block.alloc_size
                peak = max(peak, total)
        elif end_of_forward is None and event.name.startswith(BACKWARD_NODE):
            end_of_forward = total
    return total if end_of_forward is None else end_of_forward, peak


def _flatten(roots: Sequence[Any]) -> Iterator[Any]:
    waiting = list(reversed(roots))
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(reversed(event.children))
