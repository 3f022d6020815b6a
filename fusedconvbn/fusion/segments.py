"""Segments: parts of a captured graph that save nothing but their inputs. Backward runs them again,
with the batch statistics and the random states of the first run.

A segment is an interval of the graph's nodes, so nothing outside it lies between two of its nodes.
It begins and ends next to a chain, whose name is the same in every capture of the model.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..chain import BUFFER_COUNTS, BUFFERS, STATISTICS, TRAINING
from . import pooling
from .accesses import CHAIN, Accesses, mutated, written_buffers
from .match import Match
from .nodes import storage, value
from .plan import Boundary

_CHAIN_WITH_STATISTICS = torch.ops.fusedconvbn._conv_bn_chain
_STATISTICS = torch.ops.fusedconvbn._channel_stats
# Of functions without side effects, but for those that the rules below find.
_LIBRARIES = ("torch", "operator", "_operator", "math", "builtins")
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")


def boundaries(
    nodes: Sequence[fx.Node], calls: Sequence[tuple[fx.Node, Match]]
) -> dict[Boundary, int]:
    """Where segments may begin and end, by name: the index of the next node."""
    order = {node: i for i, node in enumerate(nodes)}
    found: dict[Boundary, int] = {}
    for call, match in calls:
        found["before", match.links[0].name] = order[call]
        found["after", match.links[0].name] = order[call] + 1
    return found


class Intervals:
    """Which intervals of a graph's nodes can be segments."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes, accesses = nodes, Accesses(nodes)
        self._order = accesses.order
        self._last_writes = {
            memory: max(accesses.order[n] for n in writers)
            for memory, writers in accesses.writes.items()
            if memory is not None
        }
        self._runs_twice = [_runs_twice(node) for node in nodes]

    def ends(self, first: int) -> Iterator[int]:
        """Behind which nodes a segment that begins at `first` may end: all of its nodes can run
        twice, and nobody, they included, writes to what they read from outside, then or later."""
        for i in range(first, len(self.nodes)):
            outside = [n for n in reads(self.nodes[i]) if self._order[n] < first]
            if not self._runs_twice[i] or any(self._last_write(n) >= first for n in outside):
                return
            yield i + 1

    def _last_write(self, node: fx.Node) -> int:
        return self._last_writes.get(storage(node), -1)


def _runs_twice(node: fx.Node) -> bool:
    """Whether a node may run twice: it computes tensors, or numbers, speaks to no other process,
    and changes no state but memory that is known."""
    if node.op not in ("call_function", "call_method") or isinstance(
        node.target, torch._ops.HigherOrderOperator
    ):
        return False
    module = _module(node.target)
    known = module.split(".")[0] in _LIBRARIES or module == pooling.__name__
    if node.op == "call_function" and not known:
        return False
    if any(storage(target) is None for target in mutated(node)):
        return False
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        if str(node.target).split(".")[0] in _COLLECTIVES:
            return False
        return node.target in (CHAIN, _STATISTICS) or not _is_mutable(node.target)
    if node.target in (torch._C._log_api_usage_once, operator.setitem):
        return True
    results = pytree.tree_leaves(value(node))
    return bool(results) and all(
        isinstance(t, (Tensor, int, float, torch.SymInt, torch.SymFloat)) for t in results
    )


def _module(function: Any) -> str:
    """Where a function, or the class of a method, is defined."""
    owner = getattr(function, "__objclass__", function)
    return getattr(owner, "__module__", None) or ""


def _is_mutable(target: Any) -> bool:
    overloads = (
        [target]
        if isinstance(target, torch._ops.OpOverload)
        else [getattr(target, name) for name in target.overloads()]
    )
    return any(overload._schema.is_mutable for overload in overloads)


def _run_segment(
    first: fx.GraphModule,
    again: fx.GraphModule,
    buffers: Sequence[Tensor],
    *inputs: Any,
) -> Any:
    """Runs a segment. `first` returns its results and what the second run is given: the batch
    statistics. The first run alone gets the `buffers`, to which it writes."""
    known: tuple[Tensor, ...] | None = None

    def run(*inputs: Any) -> Any:
        nonlocal known
        if known is not None:
            return again(*inputs, *known)
        results, known = first(*buffers, *inputs)
        return results

    return checkpoint(run, *inputs, use_reentrant=False)


def cut(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
    """Makes these nodes of a graph a segment."""
    graph, inside = module.graph, set(nodes)
    chains = [node for node in nodes if node.target is CHAIN]
    buffers = list(dict.fromkeys(n for node in chains for n in mutated(node)))
    inputs = list(dict.fromkeys(n for node in nodes for n in reads(node) if n not in inside))
    results = [node for node in nodes if not inside.issuperset(node.users)]
    known = [n for n in nodes if n.target is _STATISTICS or (n in chains and any(n.args[TRAINING]))]

    first = fx.Graph()
    written = {n: first.placeholder(f"buffer_{n.name}") for n in buffers}
    env = {n: first.placeholder(n.name) for n in inputs}
    statistics = {}
    for node in nodes:
        if node in chains:
            args = list(fx.map_arg(node.args, lambda n: written.get(n) or env[n]))
            both = first.call_function(_CHAIN_WITH_STATISTICS, tuple(args))
            env[node] = first.call_function(operator.getitem, (both, 0))
            statistics[node] = first.call_function(operator.getitem, (both, 1))
        else:
            env[node] = statistics[node] = first.node_copy(node, env.__getitem__)
    outputs = tuple(env[n] for n in results)
    first.output((outputs, tuple(statistics[n] for n in known)))

    again = fx.Graph()
    env = {n: again.placeholder(n.name) for n in inputs}
    statistics = {n: again.placeholder(f"known_{n.name}") for n in known}
    for node in nodes:
        if node in chains:
            args = [fx.map_arg(a, env.__getitem__) for a in _without_written(node)]
            counts = zip(node.args[BUFFER_COUNTS], node.args[TRAINING], strict=True)
            args[BUFFER_COUNTS] = [0 if training else count for count, training in counts]
            args[STATISTICS] = statistics.get(node)
            env[node] = again.call_function(CHAIN, tuple(args))
        else:
            env[node] = statistics.get(node) or again.node_copy(node, env.__getitem__)
    again.output(tuple(env[n] for n in results))
    again.eliminate_dead_code(lambda node: node.is_impure() or bool(mutated(node)))

    name = f"_segment_{sum(1 for _ in module.children())}"
    parts = {f"{name}_first": first, f"{name}_again": again}
    with graph.inserting_before(nodes[-1].next):
        for part, body in parts.items():
            module.add_module(part, fx.GraphModule({}, body))
        bodies = [graph.get_attr(part) for part in parts]
        call = graph.call_function(_run_segment, (*bodies, buffers, *inputs))
        for i, node in enumerate(results):
            result = graph.call_function(operator.getitem, (call, i))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, lambda user: user not in inside)
    for node in reversed(nodes):
        graph.erase_node(node)


def _without_written(chain: fx.Node) -> list[Any]:
    """The arguments of a chain, without the buffers that it writes to."""
    args = list(chain.args)
    buffers = zip(args[BUFFERS], written_buffers(chain), strict=True)
    args[BUFFERS] = [n for n, is_written in buffers if not is_written]
    return args


def reads(node: fx.Node) -> list[fx.Node]:
    """What a node reads in both runs."""
    args = _without_written(node) if node.target is CHAIN else node.args
    leaves = pytree.tree_leaves(([*args], node.kwargs))
    return [n for n in leaves if isinstance(n, fx.Node)]
