"""What the nodes of a captured graph are: their values, memory, arguments and readers."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def value(node: Any) -> Any:
    """A node's value when the graph was captured, usually a stand-in (a fake tensor)."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def storage(node: Any) -> int | None:
    """The identity of the memory in which a node's value lies. Views and results in place share
    it."""
    t = _local(value(node))
    return t.untyped_storage()._cdata if isinstance(t, FakeTensor) else None


def _local(t: Any) -> Any:
    """The local tensor of a replicated DTensor."""
    placements = getattr(t, "placements", None)
    return t._local_tensor if placements and all(p.is_replicate() for p in placements) else t


def is_map(t: Any) -> bool:
    """Whether a value is a tensor that the operators take."""
    return isinstance(_local(t), FakeTensor) and t.dtype in _FLOATS and t.layout == torch.strided


def named_arguments(node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any] | None:
    """The arguments of a call by name; None where it has arguments of other names."""
    if len(node.args) > len(names):
        return None
    given = defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
    return given if given.keys() <= set(names) and names[0] in given else None


def ints(given: Any, count: int) -> list[int] | None:
    values = list(given) if isinstance(given, (tuple, list)) else [given] * count
    values = values * count if len(values) == 1 else values
    return values if len(values) == count and all(type(v) is int for v in values) else None


def single_use(node: fx.Node) -> bool:
    """Whether a node is an argument of one other node, once."""
    if len(node.users) != 1:
        return False
    uses = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal uses
        uses += argument is node
        return argument

    reader = next(iter(node.users))
    fx.map_arg((reader.args, reader.kwargs), visit)
    return uses == 1


def module_of(node: fx.Node) -> str:
    """The id of the innermost module that makes a call, as a string."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    return str(next(reversed(stack))).split("@")[0]


def nbytes_of(t: Tensor) -> int:
    return values_of(t) * t.element_size()


def values_of(t: Tensor) -> int:
    """The number of a tensor's values; of a symbolic size, the one it had when it was captured."""
    values = 1
    for size in t.shape:
        values *= size if isinstance(size, int) else size.node.hint
    return values
