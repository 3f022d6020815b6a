"""Which nodes of a captured graph read and write the same memory."""

import operator
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..chain import BUFFER_COUNTS, BUFFERS, TRAINING
from .calls import ACTIVATION_CALLS, NORMS, is_norm
from .nodes import storage, value

CHAIN = torch.ops.fusedconvbn.conv_bn_chain
_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor),
)


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # may write to any buffer
        return [
            n
            for n in node.all_input_nodes
            if isinstance(t := value(n), Tensor) and not t.requires_grad
        ]
    written = [node.kwargs["out"]] if isinstance(node.kwargs.get("out"), fx.Node) else []
    if is_norm(node):
        names = NORMS[node.target]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        training = given.get("training", False)
        names = ("running_mean", "running_var", "num_batches_tracked") if training else ()
        return [given[n] for n in names if isinstance(given.get(n), fx.Node)]
    if node.target is CHAIN:
        buffers = zip(node.args[BUFFERS], written_buffers(node), strict=True)
        return [n for n, is_written in buffers if is_written]
    if writes_in_place(node) or node.target is operator.setitem:
        first = pytree.tree_leaves(node.args[:1])  # of torch._foreach_mul_ a list
        written += [a for a in first if isinstance(a, fx.Node)]
    return written


def written_buffers(chain: fx.Node) -> list[bool]:
    """For each buffer of a chain, whether the chain writes to it: those of norms in training."""
    norms = zip(chain.args[BUFFER_COUNTS], chain.args[TRAINING], strict=True)
    return [bool(training) for count, training in norms for _ in range(count)]


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node writes to its first argument and returns it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    if node.target in _IN_PLACE or named or node.kwargs.get("inplace") is True:
        return True
    return any(a is True for a in node.args[1:]) and node.target in (
        *ACTIVATION_CALLS,
        F.hardtanh,
    )


class Accesses:
    """What the nodes of a graph do to memory.

    Attributes:
        order: the index of each node.
        aliases: the nodes whose values lie in a memory, by the identity of that memory.
        writes, readers: the nodes that write to it, and that read it.
    """

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self.order = {node: i for i, node in enumerate(nodes)}
        self.aliases: dict[int | None, list[fx.Node]] = defaultdict(list)
        self.writes: dict[int | None, list[fx.Node]] = defaultdict(list)
        self.readers: dict[int | None, list[fx.Node]] = defaultdict(list)
        for node in self.order:
            self.aliases[storage(node)].append(node)
            for target in mutated(node):
                self.writes[storage(target)].append(node)
            for read in node.all_input_nodes:
                self.readers[storage(read)].append(node)

    def is_write_unseen(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether a node may stop writing to its argument x without anybody noticing: neither x nor
        another tensor in the same memory is an input of the graph, or is read afterwards. Also true
        where the node does not write to x."""
        if x not in mutated(node):
            return True
        now = self.order[node]
        before = [n for n in self.aliases[storage(x)] if self.order[n] < now]
        outside = any(n.op in ("placeholder", "get_attr") for n in before)
        return not outside and all(self.order[user] <= now for n in before for user in n.users)
