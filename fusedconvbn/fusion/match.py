"""A chain that was found in a captured graph, and its links."""

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..chain import Conv, Gate, Norm, Prelu
from ..chain import Link as ChainLink


@dataclass
class Link:
    """A convolution, a batch norm or a PReLU of a chain.

    Attributes:
        op: the link of the operator, with nodes for tensors.
        name: of the call, the same in every capture of the model.
        input: the node that the call reads.
        result: the node of the link's result: the activation's, if there is one behind it.
    """

    op: Conv | Norm | Prelu
    name: str
    input: fx.Node
    result: fx.Node


@dataclass(eq=False)
class Match:
    """A chain in a graph.

    Attributes:
        input: its input: one node, or the parts of a concatenation of channels.
        links: its links, in order.
        nodes: the nodes that it replaces, in order.
        gate, residual: their nodes, or None.
    """

    input: list[fx.Node]
    links: list[Link] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    gate: fx.Node | None = None
    residual: fx.Node | None = None

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        return " → ".join(link.name for link in self.links)

    @property
    def ops(self) -> list[ChainLink]:
        """The links for :func:`fusedconvbn.chain.pack`."""
        ops: list[ChainLink] = [link.op for link in self.links]
        gate: Any = self.gate  # a node, as all that the links hold
        return ops if gate is None else [Gate(gate), *ops]

    def inner(self) -> list[Link]:
        """The links whose results the chain may save or recompute. The result of the first one is
        map 1, or, behind a gate, map 2."""
        return self.links[:-1]

    def extend(self, node: fx.Node, x: fx.Node, op: Conv | Norm | Prelu, name: str) -> None:
        self.nodes.append(node)
        self.links.append(Link(op, name, x, node))

    def takes_activation(self) -> bool:
        op = self.links[-1].op
        return isinstance(op, Norm) and op.activation == "none"

    def saves_memory(self) -> bool:
        """Whether the chain saves less than its calls: it has a batch norm, and a convolution or an
        activation beside it."""
        norms = [link.op for link in self.links if isinstance(link.op, Norm)]
        return bool(norms) and (len(self.links) > 1 or norms[0].activation != "none")

    @property
    def stands_for(self) -> list[str]:
        """The names of the nodes of the graph as it was captured."""
        return [name for node in self.nodes for name in node.meta.get("stands_for", [node.name])]

    def reads(self) -> set[fx.Node]:
        own = set(self.nodes)
        return {n for node in self.nodes for n in node.all_input_nodes if n not in own} | set(
            self.input
        )
