"""Checkpoints (``torch.utils.checkpoint``) in a captured graph."""

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from .accesses import mutated

_CHECKPOINT = "tag_activation_checkpoint"


def _is_checkpoint(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.HigherOrderOperator) and node.target._name == _CHECKPOINT
    )


def _run_checkpoint(
    body: fx.GraphModule, written: tuple[int, ...], *args: Any, **kwargs: Any
) -> Any:
    """Runs the graph `body` in a checkpoint. Inputs that the graph writes to, at the indices
    `written`, are not passed through the checkpoint: in backward it would find them changed."""

    def run(*given: Any) -> Any:
        rest = iter(given)
        return body(*(a if i in written else next(rest) for i, a in enumerate(args)))

    return checkpoint(
        run, *(a for i, a in enumerate(args) if i not in written), use_reentrant=False, **kwargs
    )


def run_checkpoints(module: fx.GraphModule) -> None:
    """Makes the checkpoints of a graph run as such where no compiler does: a captured checkpoint
    only marks what to recompute."""
    for node in module.graph.nodes:
        if node.op == "call_function" and _is_checkpoint(node):
            body = getattr(module, node.args[0].target)
            inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
            targets = {t for n in body.graph.nodes for t in mutated(n)}
            written = tuple(i for i, n in enumerate(inputs) if n in targets)
            known = {"preserve_rng_state", "determinism_check", "debug"}
            node.target = _run_checkpoint
            node.args = (node.args[0], written, *node.args[1:])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k in known}
    module.recompile()


def bodies_of(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graphs inside the checkpoints of a graph."""
    return [
        getattr(module, node.args[0].target)
        for node in module.graph.nodes
        if node.op == "call_function" and (node.target is _run_checkpoint or _is_checkpoint(node))
    ]
