"""Finds the chains of a captured graph."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..activations import parse_activation
from ..chain import Norm, Prelu
from .accesses import Accesses, mutated, writes_in_place
from .calls import ADD, MUL, activation_of, conv_of, is_norm, norm_of, normalise, parts_of, prelu_of
from .match import Match
from .nodes import is_map, module_of, single_use, storage, value


class Names:
    """Names of calls, the same in every capture of a model: the path of the innermost module that
    makes a call, with a number from its second call on."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = paths  # by str(id(module))
        self.seen: dict[str, int] = defaultdict(int)

    def of(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = ""
        for key, (source, _) in stack.items():
            path = self.paths.get(key.split("@")[0], source.partition("].")[2])
        name = path or getattr(node.target, "__name__", "call")
        self.seen[name] += 1
        return name if self.seen[name] == 1 else f"{name}:{self.seen[name]}"


class Matcher:
    """The chains of one graph.

    Attributes:
        matches: the chains, in the order in which they end.
        norms: the name of each batch norm.
        pairs: the batch norms right behind a convolution.
        fused_pairs: how many of these are in one chain with their convolution.
        refused: by the name of a batch norm, why it is in no chain, or not in that of its
            convolution.
        groups: the process group of each synchronised batch norm, by the id of its module.
    """

    def __init__(
        self, graph: fx.Graph, paths: Mapping[str, str], groups: Mapping[str, str] | None = None
    ) -> None:
        self.graph = graph
        self.groups = groups or {}
        self.names = Names(paths)
        self.accesses = Accesses(graph.nodes)
        self.order = self.accesses.order
        self.region = self._regions()
        self.counters = self._counters()
        self.norms: dict[fx.Node, str] = {}
        self.pairs: list[fx.Node] = []
        self.refused: dict[str, str] = {}
        self.open: dict[fx.Node, Match] = {}  # by the last node
        for node in graph.nodes:
            group = self.groups.get(module_of(node))
            if node.target is normalise and group:  # even if it will be in no chain
                node.kwargs = {**node.kwargs, "process_group": group}
            self._visit(node)
        self.matches = sorted(self._undisturbed(), key=lambda m: self.order[m.end])
        self._concatenate()
        self._explain_the_rest()

    def _regions(self) -> dict[fx.Node, int]:
        """The number of calls in front of each node that change a mode, as autocast and no_grad do.
        No chain may cross such a call."""
        region, regions = 0, {}
        for node in self.graph.nodes:
            silent = node.op == "call_function" and "example_value" not in node.meta
            if silent and node.target not in _CHANGES_NO_MODE:
                region += 1
            regions[node] = region
        return regions

    def _counters(self) -> dict[Any, fx.Node]:
        """The nodes that add 1 to a module's count of batches, by the module. The count must have
        no other reader."""
        found = {}
        for node in self.graph.nodes:
            counter = node.args[0] if node.args else None
            if node.target != "add_" or node.args[1:] != (1,) or node.kwargs or node.users:
                continue
            if (
                module_of(node)
                and counter.op in ("placeholder", "get_attr")
                and len(counter.users) == 1
            ):
                found[module_of(node)] = node
        return found

    # ------------------------------------------------------------------------------ growing chains

    def _visit(self, node: fx.Node) -> None:
        if node.op not in ("call_function", "call_method"):
            return
        if is_norm(node):
            self._visit_norm(node)
        elif conv := conv_of(node):
            x, op = conv
            name = self.names.of(node)
            match = self.open.get(x)
            if match is not None and self._continues(match, x, node):
                del self.open[x]
            else:
                match = self._new(x, node)
            match.extend(node, x, op, name)
            self.open[node] = match
        elif node.target in ADD:
            self._visit_add(node)
        elif (found := activation_of(node)) is not None:
            self._activate(node, *found)
        elif prelu := prelu_of(node):
            self._visit_prelu(node, *prelu)

    def _visit_norm(self, node: fx.Node) -> None:
        name = self.norms[node] = self.names.of(node)
        behind = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(behind, fx.Node) and conv_of(behind) is not None:
            self.pairs.append(node)
            if not single_use(behind):
                self.refused[name] = (
                    "the result of the convolution in front of it is used elsewhere too"
                )
        found = norm_of(node)
        if isinstance(found, str):
            self.refused[name] = found
            return
        x, op = found
        nodes = [node]
        counter = self.counters.get(module_of(node))
        if (
            counter is not None
            and op.training
            and len(op.buffers) in (0, 2)
            and self.region[counter] == self.region[node]
        ):
            del self.counters[module_of(node)]
            op = replace(op, buffers=[*op.buffers, counter.args[0]])
            nodes.insert(0, counter)
        match = self.open.get(x)
        if match is not None and self._continues(match, x, node) and self._one_group(match, op):
            del self.open[x]
        else:
            match = Match([x])
        match.nodes += nodes[:-1]
        match.extend(node, x, op, name)
        self.open[node] = match

    def _continues(self, match: Match, x: fx.Node, node: fx.Node) -> bool:
        return match.residual is None and self._follows(x, node)

    def _follows(self, x: fx.Node, node: fx.Node) -> bool:
        """Whether a node is the only reader of x, under the same modes."""
        return single_use(x) and self.region[x] == self.region[node]

    @staticmethod
    def _one_group(match: Match, op: Norm) -> bool:
        return all(
            not (isinstance(link.op, Norm) and link.op.training and op.training)
            or link.op.group == op.group
            for link in match.links
        )

    def _new(self, x: fx.Node, node: fx.Node) -> Match:
        """A new chain whose first convolution reads x. Where x is a product with a gate, the chain
        begins with the gate."""
        if (
            x.target in MUL
            and len(x.args) == 2
            and not x.kwargs
            and self._continues(Match([x]), x, node)
        ):
            for whole, gate in (x.args, x.args[::-1]):
                gate = _unexpanded(gate, whole)
                if _is_gate(value(gate), value(whole)) and self.accesses.is_write_unseen(x, whole):
                    return Match([whole], nodes=[x], gate=gate)
        return Match([x])

    def _activate(self, node: fx.Node, x: fx.Node, activation: str) -> None:
        match = self.open.get(x)
        if match is None or not match.takes_activation() or not self._follows(x, node):
            return
        del self.open[x]
        link = match.links[-1]
        base, parameter = parse_activation(activation)
        link.op, link.result = replace(link.op, activation=base, parameter=parameter), node
        match.nodes.append(node)
        self.open[node] = match

    def _visit_prelu(self, node: fx.Node, x: fx.Node, op: Prelu) -> None:
        match = self.open.get(x)
        if match is None or not isinstance(match.links[-1].op, Norm) or not self._follows(x, node):
            return
        del self.open[x]
        match.extend(node, x, op, self.names.of(node))
        self.open[node] = match

    def _visit_add(self, node: fx.Node) -> None:
        if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
            return
        candidates = []
        for this, other in (node.args, node.args[::-1]):
            match = self.open.get(this)
            if match is None or match.residual is not None or not match.takes_activation():
                continue
            if (
                this is not other
                and is_map(value(other))
                and self.accesses.is_write_unseen(node, other)
                and self._follows(this, node)
            ):
                candidates.append((len(match.links), match, this, other))
        if not candidates:
            return
        _, match, this, other = max(candidates, key=lambda c: c[0])
        del self.open[this]
        match.residual = other
        match.nodes.append(node)
        link = match.links[-1]
        link.op, link.result = replace(link.op, residual=other), node
        self.open[node] = match

    # --------------------------------------------------------------------- refusing unsafe chains

    def _undisturbed(self) -> list[Match]:
        """The chains that no other node disturbs. Writes in place by nodes of these chains do not
        count, as the chains do not do them in place."""
        chains = [m for m in self.open.values() if m.saves_memory()]
        while True:
            self.gone = {
                n for m in chains for n in m.nodes if is_map(value(n)) and writes_in_place(n)
            }
            left = [m for m in chains if self._is_undisturbed(m)]
            if len(left) == len(chains):
                return left
            chains = left

    def _is_undisturbed(self, match: Match) -> bool:
        """Whether a chain may run where its last node stands. Between its first and its last node
        nobody else may write to what it reads, or read what it writes to. Its residual must not be
        written to afterwards either: the chain saves it, which eager does not."""
        own = {*match.nodes, *self.gone}
        first, last = self.order[match.nodes[0]], self.order[match.end]
        behind = storage(match.residual) if match.residual is not None else None
        disturbing = [
            node
            for kind in {storage(n) for n in match.reads()} - {None}
            for node in self.accesses.writes.get(kind, ())
            if node not in own
            and (first < self.order[node] < last or (kind == behind and self.order[node] > last))
        ]
        stay = [node for node in match.nodes if node not in self.gone]
        written = {storage(t) for node in stay for t in mutated(node)} - {None}
        disturbing += [
            node
            for kind in written
            for node in self.accesses.readers.get(kind, ())
            if node not in match.nodes and first < self.order[node] < last
        ]
        for link in match.links if disturbing else ():
            self.refused[link.name] = (
                f"`{disturbing[0].name}` of the graph disturbs what it reads or writes to"
            )
        return not disturbing

    # ----------------------------------------------------------------------- virtual concatenations

    def _concatenate(self) -> None:
        """Lets chains read the parts of a concatenation of channels, where only chains read the
        whole."""
        heads: dict[fx.Node, list[Match]] = defaultdict(list)
        for match in self.matches:
            if match.gate is None:
                heads[match.input[0]].append(match)

        def is_virtual(cat: fx.Node, parts: list[fx.Node]) -> bool:
            chains = [m for m in heads[cat] if m.residual is not cat]
            by_chains = {n for m in chains for n in m.nodes if cat in n.all_input_nodes}
            written = any(
                self.order[w] > self.order[p]
                for p in parts
                for w in self.accesses.writes.get(storage(p), ())
                if w not in self.gone
            )
            return not written and all(
                user in by_chains or parts_of(user) is not None for user in cat.users
            )

        flat: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            parts = parts_of(node)
            if parts is None:
                continue
            parts = [p for part in parts for p in flat.get(part, [part])]
            if any(p in flat for p in parts_of(node)):
                node.args, node.kwargs = (parts, 1), {}
            if is_virtual(node, parts):
                flat[node] = parts
                for match in heads[node]:
                    match.input = parts

    # -------------------------------------------------------------------------------------- report

    def _explain_the_rest(self) -> None:
        """A reason for every batch norm that is in no chain, or not in that of its convolution."""
        chains = {node: m for m in self.matches for node in m.nodes}
        apart = [
            node
            for node in self.pairs
            if node not in chains or chains.get(node.all_input_nodes[0]) is not chains[node]
        ]
        self.fused_pairs = len(self.pairs) - len(apart)
        for node, name in self.norms.items():
            if node in chains and node not in apart:
                self.refused.pop(name, None)
            else:
                self.refused.setdefault(
                    name, "it has neither a convolution nor an activation beside it"
                )


_CHANGES_NO_MODE = (torch._C._log_api_usage_once, torch._assert)


def _is_gate(gate: Any, x: Any) -> bool:
    """Whether a gate has the shape (N, C, 1, …) for x of shape (N, C, *)."""
    if not is_map(gate) or not is_map(x) or gate.dim() != x.dim() or gate.dtype != x.dtype:
        return False
    return gate.shape[:2] == x.shape[:2] and all(type(s) is int and s == 1 for s in gate.shape[2:])


def _unexpanded(node: Any, other: Any) -> Any:
    """The node itself, or, where it is expanded to the shape of `other`, the node before that."""
    if isinstance(node, fx.Node) and node.target == "expand_as" and node.args[1:] == (other,):
        return node.args[0]
    return node
