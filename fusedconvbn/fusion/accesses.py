"""Who reads and who writes what in a captured graph, under whatever name."""

from collections import defaultdict

from torch import fx

from .calls import mutated, storage


class Accesses:
    """What the nodes of a graph do to memory.

    Attributes:
        order: the place of each node.
        names: by the identity of memory, the nodes whose value lies in it.
        writes, readers: those that write to it, and that read it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.names: dict[int | None, list[fx.Node]] = defaultdict(list)
        self.writes: dict[int | None, list[fx.Node]] = defaultdict(list)
        self.readers: dict[int | None, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self.names[storage(node)].append(node)
            for target in mutated(node):
                self.writes[storage(target)].append(node)
            for read in node.all_input_nodes:
                self.readers[storage(read)].append(node)

    def may_be_lost(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether nobody misses it when a node does not write to its argument x, if it does: nobody reads x afterwards, nor what
        x is a view of or has as a view, and none of these is an input of the graph."""
        if x not in mutated(node):
            return True
        now = self.order[node]
        before = [n for n in self.names[storage(x)] if self.order[n] < now]
        outside = any(n.op in ("placeholder", "get_attr") for n in before)
        return not outside and all(self.order[user] <= now for n in before for user in n.users)
