"""The parts of a captured graph: what runs between two neighbouring boundaries, next to chains."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, fx

from .graph import Graph, inner_map
from .nodes import nbytes_of, value
from .plan import Boundary, InnerMap
from .profile import Profile
from .segments import boundaries, reads

_MOST_PARTS = 72


@dataclass
class Part:
    """What runs between two neighbouring boundaries. Storages have numbers.

    Attributes:
        begin, end: the boundaries.
        first, last: the indices of its first node, and behind its last one.
        seconds, flops: of running it again.
        saves: the storages that it saves with no inner map saved.
        reads, makes: the storages that its nodes read, and those of their results.
        maps: its inner maps.
        grads: bytes of the gradients of its parameters.
        forward, working: bytes that its forward and its backward need besides, if it saves no inner
            map.
    """

    begin: Boundary
    end: Boundary
    first: int
    last: int
    seconds: float = 0.0
    flops: int = 0
    saves: set[int] = field(default_factory=set)
    reads: set[int] = field(default_factory=set)
    makes: set[int] = field(default_factory=set)
    maps: list[InnerMap] = field(default_factory=list)
    grads: int = 0
    forward: int = 0
    working: int = 0

    def join(self, other: Part) -> None:
        """Takes the part behind it in."""
        self.end, self.last = other.end, other.last
        self.seconds += other.seconds
        self.flops += other.flops
        self.saves |= other.saves
        self.reads |= other.reads
        self.makes |= other.makes
        self.maps += other.maps
        self.grads += other.grads
        self.forward = max(self.forward, other.forward)
        self.working = max(self.working, other.working)


def parts_of(graph: Graph) -> list[Part]:
    """The parts of a graph, between the boundaries that the fewest bytes cross."""
    least = graph.least
    nodes = list(graph.module.graph.nodes)
    names = {index: name for name, index in boundaries(nodes, graph.calls).items()}
    start = next(i for i, node in enumerate(nodes) if node.op not in ("placeholder", "get_attr"))
    ends = sorted({start, *names, len(nodes) - 1})
    maps, matches = {m.name: m for m in graph.maps}, dict(graph.calls)
    weights: set[fx.Node] = set()
    known = set[int]().union(*(least.holds[node.name] for node in nodes[:start]))
    parts = []
    for first, last in pairwise(ends):
        part = Part(names.get(first, ("", "")), names.get(last, ("", "")), first, last)
        for node in nodes[first:last]:
            part.saves |= least.saves[node.name]
            part.makes |= least.holds[node.name] - known  # the others are those of views
            known |= least.holds[node.name]
            part.flops += least.flops[node.name]
            for n in reads(node):
                if not is_weight(n):
                    part.reads |= least.holds[n.name]
                elif n not in weights:
                    weights.add(n)
                    part.grads += nbytes_of(value(n))
            if node in matches:
                match = matches[node]
                part.maps += [maps[link.name] for link in match.inner() if link.name in maps]
                part.seconds += sum(
                    maps.get(link.name, inner_map(link, graph.device)).seconds
                    for link in match.links
                )
            else:
                part.seconds += least.flops[node.name] / graph.device.flops[4]
                part.seconds += _moved(node, least) / graph.device.bandwidth + graph.device.launch
        parts.append(part)
    return _few(parts, least)


def is_weight(node: fx.Node) -> bool:
    t = value(node)
    return node.op == "placeholder" and isinstance(t, Tensor) and t.requires_grad


def _moved(node: fx.Node, least: Profile) -> int:
    """Bytes that a node reads and writes; 0 for a view."""
    own = least.holds[node.name]
    read = set().union(*(least.holds[n.name] for n in node.all_input_nodes))
    return 0 if own <= read else sum(least.nbytes[s] for s in own | read)


def _few(parts: list[Part], least: Profile) -> list[Part]:
    """At most `_MOST_PARTS` parts, joined first where more bytes cross the boundary between them
    than the next ones."""
    last_read = {s: i for i, part in enumerate(parts) for s in part.reads}
    crossing, live = [], set[int]()
    for i, part in enumerate(parts):
        live = {s for s in live | part.makes if last_read.get(s, -1) > i}
        crossing.append(sum(least.nbytes[s] for s in live))

    def is_low(i: int) -> bool:
        return crossing[i] <= min(crossing[max(i - 1, 0)], crossing[i + 1])

    # Of equally good ones, every second, then every fourth, and so on stays.
    order = sorted(range(len(parts) - 1), key=lambda i: (not is_low(i), -((i + 1) & -(i + 1)), i))
    kept = set(order[: _MOST_PARTS - 1])
    result = [parts[0]]
    for i, part in enumerate(parts[1:]):
        if i in kept:
            result.append(part)
        else:
            result[-1].join(part)
    return result
