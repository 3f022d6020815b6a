"""One captured graph: its chains, rewritten as calls of the operator, and what it saves."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..chain import SAVED, Conv
from .calls import conv_of
from .checkpoints import bodies_of, run_checkpoints
from .match import Link, Match
from .matcher import Matcher
from .nodes import nbytes_of, value, values_of
from .normal_form import to_normal_form
from .plan import (
    CPU,
    Boundary,
    Device,
    InnerMap,
    device_figures,
    flops_per_value,
    seconds_per_value,
)
from .pooling import rewrite_pooling
from .profile import Profile, device_of, profile
from .rewrite import rewrite
from .segments import Intervals, boundaries, cut


@dataclass
class Graph:
    """A captured graph whose chains save nothing but their inputs, until :meth:`save` says what
    else.

    Attributes:
        module: runs it.
        matches: its chains.
        maps: the inner maps of the chains, in order; where it was measured, those that need a
            gradient.
        links: the links that compute those maps.
        calls: the nodes that run the chains, with the chains.
        runs: how often it runs in one forward of the model.
        norms: the number of its batch norms.
        pairs: of the batch norms right behind a convolution.
        fused_pairs: of these in one chain with their convolution.
        refused: by the name of a batch norm, why it is in no chain, or not in that of its
            convolution.
        step_flops: floating point operations of the convolutions in an unfused training step.
        device: the figures of the device that it runs on.
        eager, least: what it saves unfused, and with no inner map saved.
        example_inputs: those that Dynamo gave.
    """

    module: fx.GraphModule
    matches: list[Match] = field(default_factory=list)
    maps: list[InnerMap] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    norms: int = 0
    pairs: int = 0
    fused_pairs: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    step_flops: int = 0
    device: Device = CPU
    runs: int = 0
    eager: Profile = field(default_factory=Profile)
    least: Profile = field(default_factory=Profile)
    calls: list[tuple[fx.Node, Match]] = field(default_factory=list)
    example_inputs: Sequence[Any] = ()
    _inside: "list[Graph]" = field(default_factory=list)  # of its checkpoints

    @classmethod
    def of(
        cls,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        paths: Mapping[str, str],
        groups: Mapping[str, str] | None = None,
        *,
        measured: bool = True,
        compiled: bool = False,
    ) -> "Graph":
        """Finds and rewrites the chains of a captured graph.

        Args:
            module: changed in place.
            example_inputs: those that Dynamo gives a backend.
            paths: of the modules of the model, by their ids.
            groups: names of the process groups of synchronised batch norms, by the ids of the
                modules.
            measured: whether to measure what is saved unfused and fused.
            compiled: whether a compiler gets the result; it has its own pooling and checkpoints.
        """
        found = cls(module, example_inputs=example_inputs)
        if not compiled:
            run_checkpoints(module)
        if measured:
            found.eager = profile(module, example_inputs)
        for body in bodies_of(module):
            found._inside.append(cls.of(body, (), paths, groups, measured=False, compiled=compiled))
        graph = module.graph
        to_normal_form(graph)
        matcher = Matcher(graph, paths, groups)
        found.matches, found.refused = matcher.matches, matcher.refused
        found.norms, found.pairs, found.fused_pairs = (
            len(matcher.norms),
            len(matcher.pairs),
            matcher.fused_pairs,
        )
        found.step_flops = sum(
            3 * _flops(op, node) for node in graph.nodes if (op := conv_of(node)) is not None
        )
        found.device = device_figures(device_of([value(n) for n in graph.nodes]))
        found.links = [
            link
            for match in found.matches
            for link in match.inner()
            if not measured or value(link.result).requires_grad  # nothing is saved otherwise
        ]
        found.maps = [inner_map(link, found.device) for link in found.links]
        found.calls = rewrite(graph, found.matches)
        if found.matches and not compiled:
            rewrite_pooling(graph)
        module.recompile()
        for inner in found._inside:
            found.norms += inner.norms
            found.pairs += inner.pairs
            found.fused_pairs += inner.fused_pairs
            found.step_flops += inner.step_flops
            found.refused |= inner.refused
        if measured:
            found.least = profile(module, example_inputs)
        return found

    def save(self, names: Collection[str]) -> None:
        """Saves the results of the links with these names, and recomputes the other inner maps."""
        for call, match in self.calls:
            _save(call, match, names)
        self.module.recompile()
        # Maps inside a checkpoint live only during its backward, which recomputes them anyway.
        for inner in self._inside:
            inner.save([link.name for link in inner.links])

    def cut(self, segments: Mapping[tuple[Boundary, Boundary], Collection[str]]) -> None:
        """Makes segments, where this capture allows them, behind :meth:`save`. `segments` names
        the inner maps that each saves while its backward runs."""
        nodes = list(self.module.graph.nodes)
        at, intervals = boundaries(nodes, self.calls), Intervals(nodes)
        found = [(at.get(a, -1), at.get(b, -1), names) for (a, b), names in segments.items()]
        for first, last, names in sorted(found, key=lambda s: s[:2], reverse=True):
            if first < 0 or last not in intervals.ends(first):
                continue
            inside = nodes[first:last]  # no index in front of them changes
            for call, match in self.calls:
                if call in inside:
                    _save(call, match, names)
            cut(self.module, inside)
        self.module.recompile()


def _save(call: fx.Node, match: Match, names: Collection[str]) -> None:
    first = 1 + (match.gate is not None)
    saved = [first + i for i, link in enumerate(match.inner()) if link.name in names]
    call.update_arg(SAVED, saved)


def _flops(conv: tuple[fx.Node, Conv], node: fx.Node) -> int:
    return int(flops_per_value(conv[1], value(conv[1].weight).shape) * values_of(value(node)))


def inner_map(link: Link, device: Device) -> InnerMap:
    result = value(link.result)
    weight = value(link.op.weight).shape if isinstance(link.op, Conv) else ()
    values = values_of(result)
    seconds = values * seconds_per_value(
        link.op, weight, result.element_size(), device, contiguous=result.is_contiguous()
    )
    flops = int(flops_per_value(link.op, weight) * values)
    return InnerMap(link.name, nbytes_of(result), flops, device.launch + seconds)
