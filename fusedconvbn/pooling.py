"""Means over positions, as in front of squeeze-and-excitation.

Their gradient in PyTorch divides a map by the number of positions and so makes one, which is then added to that of the map's
other readers. It is the same value at every position: divided before it is expanded, no map is made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .tracing import Guards

_MODULES = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_FUNCTIONS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}


def position_mean(input: Tensor, dims: list[int]) -> Tensor:
    """``input.mean(dims, keepdim=True)``, to the bit, and so its gradient. Of half types it is that: their mean is taken in
    float, and no gradient is cast before it is expanded."""
    if input.dtype == torch.float16 or input.dtype == torch.bfloat16:
        return input.mean(dims, keepdim=True)
    count = 1
    for d in dims:
        count *= input.size(d)
    return input.sum(dims, keepdim=True, dtype=input.dtype) / count


def rewrite_means(graph: fx.Graph, modules: dict[str, nn.Module], guards: Guards) -> None:
    """Puts `position_mean` in the place of each mean over positions."""
    for node in list(graph.nodes):
        dims = _dims(node, modules)
        if dims is None:
            continue
        if node.op == "call_module":
            guards.add(tuple(node.target.split(".")), modules[node.target])
        with graph.inserting_before(node):
            mean = graph.call_function(position_mean, (node.args[0], dims))
        node.replace_all_uses_with(mean)
        graph.erase_node(node)


def _dims(node: fx.Node, modules: dict[str, nn.Module]) -> list[int] | None:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        module = modules.get(node.target)  # none of a chain
        return _last(_MODULES.get(type(module)), getattr(module, "output_size", None))
    rest = dict(zip(("size", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    if node.op == "call_function" and node.target in _FUNCTIONS:
        size = rest.get("size", rest.get("output_size"))
        return _last(_FUNCTIONS[node.target], size)
    if node.target in ("mean", torch.mean) and rest.get("keepdim") is True:
        dims = rest.get("size", rest.get("dim"))
        plain = isinstance(dims, (tuple, list)) and all(isinstance(d, int) for d in dims)
        return list(dims) if plain and "dtype" not in rest and "out" not in rest else None
    return None


def _last(number: int | None, size: object) -> list[int] | None:
    """The last dimensions, so many, where each is pooled to one value."""
    if number is None or size not in (1, (1,) * number, [1] * number):
        return None
    return list(range(-number, 0))
