"""Measures what a captured graph saves for backward, without computing its values."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from ..memory import saved_storages
from .copies import copy_of


@dataclass
class Profile:
    """One forward pass.

    Attributes:
        saved: bytes that autograd saves for backward.
        by_node: by the name of a node, the bytes that were first saved while it ran.
    """

    saved: int = 0
    by_node: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class _Recorded(fx.Interpreter):
    """Runs a graph, and records which node is running."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.running = ""

    def run_node(self, node: fx.Node) -> Any:
        self.running = node.name
        return super().run_node(node)


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
    interpreter = _Recorded(module)

    def saw(nbytes: int) -> None:
        found.by_node[interpreter.running] += nbytes

    def of_input(t: Any) -> Any:
        if isinstance(t, torch.SymInt):
            return t.node.hint
        return of_tensor(t) if isinstance(t, Tensor) else t

    inputs = [of_input(t) for t in example_inputs]
    with saved_storages(device_of(inputs), saw) as storages:
        # The result holds the saved tensors until they are counted.
        result = interpreter.run(*inputs)
        found.saved = sum(storages.values())
        del result
    return found
