"""``torch.compile(model, backend="fusedconvbn")``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .model import fused_graph
from .plan import Peak, Plan, parse_memory

_OPTIONS = ("memory", "inner")


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that torch finds by its name: runs the chains of a captured graph as
    :func:`fusedconvbn.fuse` does.

    Args:
        module, example_inputs: from TorchDynamo.
        options: of ``torch.compile``. ``memory`` is as in :func:`fusedconvbn.fuse`, but the budget
            of each captured graph. ``inner`` names a backend, as ``"inductor"``, that compiles
            everything else; with None it runs eagerly.

    Returns:
        A function that runs the graph.

    Raises:
        ValueError, TypeError: an option is unknown, or breaks a rule of :func:`fusedconvbn.fuse`.
    """
    options = options or {}
    for name in options:
        if name not in _OPTIONS:
            raise ValueError(
                f"backend 'fusedconvbn': expected options {', '.join(map(repr, _OPTIONS))}, "
                f"got {name!r}"
            )
    inner = options.get("inner")
    memory = parse_memory(options.get("memory", "auto"))
    if isinstance(memory, Peak):
        raise ValueError(
            "backend 'fusedconvbn': expected memory for what is saved, got a peak, which "
            "fusedconvbn.fuse takes"
        )
    plan = Plan(memory)
    fused = fused_graph(module, example_inputs, plan, {}, compiled=inner is not None).module
    if inner is None:
        return fused.forward
    return torch._dynamo.lookup_backend(inner)(fused, list(example_inputs))
