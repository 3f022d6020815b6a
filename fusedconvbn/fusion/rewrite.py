"""Puts calls of the operators in the place of the chains that were found in a graph."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..chain import Norm, pack
from .calls import is_map, value
from .match import Match
from .pooling import position_mean


def rewrite(graph: fx.Graph, matches: Sequence[Match]) -> list[tuple[fx.Node, Match]]:
    """Puts a call of ``conv_bn_chain`` that saves no inner map in the place of each match, in the order in which they end.
    Returns the calls with their matches, whose nodes are gone then."""
    readers = Counter(part for m in matches if _reads_statistics(m) for part in m.input)
    calls: dict[fx.Node, fx.Node] = {}  # by the ends of the chains
    made = []
    statistics: dict[Any, fx.Node] = {}  # of parts of concatenations, for all chains that read them
    for match in matches:
        shared = _reads_statistics(match) and any(readers[part] > 1 for part in match.input)
        input = [calls.get(part, part) for part in match.input]
        packed = pack(input, match.ops)
        packed.tensors = [calls.get(t, t) for t in packed.tensors]
        with graph.inserting_before(match.end):
            known = (
                _channel_stats(graph, input, packed.process_group, statistics) if shared else None
            )
            call = graph.call_function(torch.ops.fusedconvbn.conv_bn_chain, packed.call((), known))
        call.meta = dict(match.end.meta)
        match.end.replace_all_uses_with(call)
        calls[match.end] = call
        for node in reversed(match.nodes):
            graph.erase_node(node)
        made.append((call, match))
    for node in reversed(list(graph.nodes)):
        if node.target in (torch.cat, torch.concat, torch.concatenate) and not node.users:
            graph.erase_node(node)
    return made


def _reads_statistics(match: Match) -> bool:
    op = match.links[0].op
    return len(match.input) > 1 and isinstance(op, Norm) and op.training


def _channel_stats(
    graph: fx.Graph, parts: list[fx.Node], group: str, known: dict[Any, fx.Node]
) -> fx.Node:
    """Of a concatenation, those of each part being computed once."""
    for part in parts:
        if (part, group) not in known:
            detached = graph.call_method("detach", (part,))
            known[part, group] = graph.call_function(
                torch.ops.fusedconvbn._channel_stats, (detached, group)
            )
    return graph.call_function(torch.cat, ([known[part, group] for part in parts], 1))


# -------------------------------------------------------------------------------------------------- pooling

_MEANS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
_MAX_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def rewrite_pooling(graph: fx.Graph) -> None:
    """Puts `position_mean` and a `max_pool2d` that saves one byte for each value in the place of PyTorch's."""
    for node in list(graph.nodes):
        if not node.args or not is_map(value(node.args[0])):
            continue
        dims, options = _mean_dims(node), _max_options(node)
        if dims is None and options is None:
            continue
        with graph.inserting_before(node):
            function, rest = position_mean, (dims,)
            # PyTorch's max pool keeps its input and eight bytes for each value of its result.
            if dims is None:
                function, rest = torch.ops.fusedconvbn.max_pool2d, options
            pooled = graph.call_function(function, (node.args[0], *rest))
        pooled.meta = node.meta
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments behind the first, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | node.kwargs


def _mean_dims(node: fx.Node) -> list[int] | None:
    if node.target in _MEANS:
        number, size = _MEANS[node.target], _given(node, "output_size").get("output_size")
        return list(range(-number, 0)) if size in (1, (1,) * number, [1] * number) else None
    if node.target in ("mean", torch.mean):
        given = _given(node, "dim", "keepdim")
        dims, plain = given.get("dim"), given.keys() == {"dim", "keepdim"}
        if plain and given["keepdim"] is True and isinstance(dims, (tuple, list)):
            return list(dims) if dims and all(isinstance(d, int) for d in dims) else None
    return None


def _max_options(node: fx.Node) -> tuple[Any, ...] | None:
    if node.target not in (F.max_pool2d, torch.max_pool2d) or value(node.args[0]).dim() != 4:
        return None
    given = _given(node, *_MAX_OPTIONS, "return_indices")
    if given.pop("return_indices", False) is not False:
        return None
    options = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, **given}
    ceil_mode = options.pop("ceil_mode")
    lists = [_as_list(options.pop(name, None)) for name in _MAX_OPTIONS[:-1]]
    if options or None in lists or not isinstance(ceil_mode, bool):
        return None
    return (*lists, ceil_mode)


def _as_list(value: object) -> list[int] | None:
    """One value for both dimensions, or one for each; none for a stride that is the kernel's size."""
    values = [value, value] if isinstance(value, int) else [] if value is None else value
    is_list = isinstance(values, (tuple, list)) and all(isinstance(v, int) for v in values)
    return list(values) if is_list and len(values) in (0, 1, 2) else None
