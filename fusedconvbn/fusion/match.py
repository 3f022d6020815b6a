"""A chain that was found in a captured graph, and its links."""

from dataclasses import dataclass, field

from torch import fx

from ..chain import Conv, Gate, Norm, Prelu
from ..chain import Link as ChainLink


@dataclass
class Link:
    """A convolution, a batch norm or a PReLU of a chain.

    Attributes:
        op: with nodes in the place of tensors.
        name: of the call, in any capture of the model.
        input: the node that its call reads.
        result: the node of its result, the activation's if there is one behind it.
    """

    op: Conv | Norm | Prelu
    name: str
    input: fx.Node
    result: fx.Node


@dataclass(eq=False)
class Match:
    """A chain in a graph.

    Attributes:
        input: the maps whose channels it begins with: one, or the parts of a concatenation.
        nodes: what it stands for, in order.
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
        """The links as :func:`fusedconvbn.chain.pack` takes them."""
        ops: list[ChainLink] = [link.op for link in self.links]
        return ops if self.gate is None else [Gate(self.gate), *ops]

    def inner(self) -> list[Link]:
        """Those whose results the chain may save or recompute; the first one's is map 1, or 2 behind a gate."""
        return self.links[:-1]

    def extend(self, node: fx.Node, x: fx.Node, op: Conv | Norm | Prelu, name: str) -> None:
        self.nodes.append(node)
        self.links.append(Link(op, name, x, node))

    def takes_activation(self) -> bool:
        op = self.links[-1].op
        return isinstance(op, Norm) and op.activation == "none"

    def saves_memory(self) -> bool:
        """Whether it keeps less than its calls would: batch norm has a convolution beside it, or an activation."""
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
