"""Replaces the chains that were found in a graph by calls of the operator."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..chain import Norm, pack
from .calls import CAT
from .match import Match
from .nodes import value


def rewrite(graph: fx.Graph, matches: Sequence[Match]) -> list[tuple[fx.Node, Match]]:
    """Replaces each match, in the order in which they end, by a call of ``conv_bn_chain`` that
    saves no inner map. Returns the calls with their matches, whose nodes are no longer in the
    graph."""
    readers = Counter(part for m in matches if _reads_statistics(m) for part in m.input)
    calls: dict[fx.Node, fx.Node] = {}  # by the last nodes of the chains
    result = []
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
        result.append((call, match))
    for node in reversed(list(graph.nodes)):
        if node.target in CAT and not node.users:
            graph.erase_node(node)
    return result


def _reads_statistics(match: Match) -> bool:
    op = match.links[0].op
    return len(match.input) > 1 and isinstance(op, Norm) and op.training


def _channel_stats(
    graph: fx.Graph, parts: list[fx.Node], group: str, known: dict[Any, fx.Node]
) -> fx.Node:
    """The statistics of a concatenation; those of each part are computed once for all chains."""

    def call(function: Any, *args: Any) -> fx.Node:
        node = graph.call_function(function, args)
        node.meta["example_value"] = function(*fx.map_arg(args, value))
        return node

    for part in parts:
        if (part, group) not in known:
            detached = call(torch.detach, part)
            known[part, group] = call(torch.ops.fusedconvbn._channel_stats, detached, group)
    return call(torch.cat, [known[part, group] for part in parts], 1)
