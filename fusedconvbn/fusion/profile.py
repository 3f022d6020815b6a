"""Measures what a captured graph saves for backward, without computing its values."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..memory import saved_storages
from .copies import copy_of


@dataclass
class Profile:
    """One forward pass. Storages have numbers.

    Attributes:
        saved: bytes that autograd saves for backward.
        by_node: by the name of a node, the bytes that were first saved while it ran.
        saves: by the name of a node, the storages that were saved while it ran.
        holds: by the name of a node, the storages of its result.
        nbytes: of each storage.
        flops: floating point operations of each node.
    """

    saved: int = 0
    by_node: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    saves: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    holds: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    nbytes: dict[int, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class _Operators(TorchDispatchMode):
    """Counts what the operators of the running node do."""

    def __init__(self, found: Profile) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.running = found, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.found.flops[self.running] += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _Recorded(fx.Interpreter):
    """Runs a graph, and records which node is running and what it returns."""

    def __init__(self, module: fx.GraphModule, found: Profile) -> None:
        super().__init__(module)
        self.found, self.operators = found, _Operators(found)
        # The weak references keep no memory, but as long as they exist no other storage can get the
        # same identity.
        self.numbers: dict[StorageWeakRef, int] = {}
        self._saved: set[int] = set()

    def run(self, *inputs: Any, **options: Any) -> Any:
        with self.operators:
            return super().run(*inputs, **options)

    def run_node(self, node: fx.Node) -> Any:
        self.operators.running = node.name
        result = super().run_node(node)
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                storage = t.untyped_storage()
                self.found.holds[node.name].add(
                    self.number(StorageWeakRef(storage), storage.nbytes())
                )
        return result

    def saw(self, reference: StorageWeakRef, nbytes: int) -> None:
        node, number = self.operators.running, self.number(reference, nbytes)
        if number not in self._saved:
            self.found.by_node[node] += nbytes
            self._saved.add(number)
        self.found.saves[node].add(number)

    def number(self, reference: StorageWeakRef, nbytes: int) -> int:
        number = self.numbers.setdefault(reference, len(self.numbers))
        self.found.nbytes[number] = nbytes
        return number


def device_of(tensors: Sequence[Any]) -> torch.device:
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def profile(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Profile:
    """Runs a graph with stand-ins for its input tensors, or with copies of them where it needs
    values. Symbolic numbers have the values of the capture."""
    fakes = [t.fake_mode for t in example_inputs if isinstance(t, FakeTensor)]
    mode = fakes[0] if fakes else FakeTensorMode(allow_non_fake_inputs=True)

    def stand_in(t: Tensor) -> Tensor:
        return t if isinstance(t, FakeTensor) else mode.from_tensor(t, static_shapes=True)

    try:
        with mode:
            return _run(module, example_inputs, stand_in)
    except DataDependentOutputException:
        device = device_of(example_inputs)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return _run(module, example_inputs, copy_of)


def _run(
    module: fx.GraphModule, example_inputs: Sequence[Any], of_tensor: Callable[[Tensor], Tensor]
) -> Profile:
    found = Profile()
    interpreter = _Recorded(module, found)

    def of_input(t: Any) -> Any:
        if isinstance(t, torch.SymInt):
            return t.node.hint
        return of_tensor(t) if isinstance(t, Tensor) else t

    inputs = [of_input(t) for t in example_inputs]
    with saved_storages(device_of(inputs), interpreter.saw) as storages:
        # The result holds the saved tensors until they are counted.
        result = interpreter.run(*inputs)
        found.saved = sum(storages.values())
        del result
    return found
