"""Fused forwards for TorchScript: the same graph, with each chain written out as a call of the operator."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .batch_norm import ATTRIBUTES, batch_norm_link
from .links import Chain, ConvLink, submodule
from .synchronised import Synchronised


def scriptable(owner: nn.Module, graph: fx.Graph, chains: dict[str, Chain]) -> fx.GraphModule:
    """A module with the parameters, buffers and modes of `owner` that TorchScript can compile.

    Args:
        graph: of the forward, in which call_module nodes stand for chains.
        chains: by the targets of those nodes.

    Raises:
        NotImplementedError: a chain reads a list of tensors that is made at run time, and a packed chain has the number of its parts.
    """
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in chains:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_written_out(graph, node, owner, chains[node.target]))
            graph.erase_node(node)
    return fx.GraphModule(owner, graph, type(owner).__name__)


def _written_out(graph: fx.Graph, node: fx.Node, owner: nn.Module, chain: Chain) -> fx.Node:
    parts = node.args[0]
    residual, gate = node.kwargs.get("residual"), node.kwargs.get("gate")
    parts = [parts] if isinstance(parts, fx.Node) and not _is_list(parts) else parts
    if not isinstance(parts, (list, tuple)):
        raise NotImplementedError(
            "a concatenation of a list that is made at run time in TorchScript"
        )
    tensors: list[Any] = list(parts)
    links: list[int] = [3, len(parts)] if len(parts) > 1 else []
    first = chain.links[0]
    if isinstance(first, ConvLink) and first.options.pad:
        whole = parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (list(parts), 1))
        pad = (whole, first.options.pad, first.options.pad_mode)
        tensors, links = [graph.call_function(F.pad, pad)], []
    if gate is not None:
        tensors.append(gate)
        links.append(2)

    def attribute(path: tuple[str, ...], name: str) -> fx.Node:
        return graph.get_attr(".".join((*path, name)))

    buffers: Any = []
    scalars: list[float] = []
    counts: list[Any] = []
    momenta: list[Any] = []
    training: list[Any] = []
    group = ""
    for i, link in enumerate(chain.links):
        module = submodule(owner, link.path)
        given = [n for n in ("weight", "bias") if getattr(module, n) is not None]
        tensors += [attribute(link.path, name) for name in given]
        if isinstance(link, ConvLink):
            links += link.packed("bias" in given)
            continue
        last = residual if i + 1 == len(chain.links) else None
        if last is not None:
            tensors.append(last)
        links += link.packed("weight" in given, "bias" in given, last is not None)
        scalars += [module.eps, link.parameter]
        own = graph.call_function(
            batch_norm_link, tuple(attribute(link.path, name) for name in ATTRIBUTES)
        )
        found = [graph.call_function(operator.getitem, (own, i)) for i in range(4)]
        buffers = graph.call_function(operator.add, (buffers, found[0])) if counts else found[0]
        for values, value in zip((counts, momenta, training), found[1:], strict=True):
            values.append(value)
        if isinstance(module, nn.SyncBatchNorm):
            group = Synchronised(True, module.process_group).group_name()
    arguments = (tensors, buffers, links, scalars, counts, momenta, training, group)
    return graph.call_function(
        torch.ops.fusedconvbn.conv_bn_chain, (*arguments, list(chain.kept), None)
    )


def _is_list(node: fx.Node) -> bool:
    """Whether a node's value is a list: the input of a concatenation that the graph does not make."""
    return node.meta.get("is_list", False)
