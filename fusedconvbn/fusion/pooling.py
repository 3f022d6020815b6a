"""Pools of fused models that save less, with PyTorch's own numbers.

The gradient of a mean over positions is one value, expanded to all of them. PyTorch expands it
first and then divides it by their number, which needs a new map. Divided first, the expanded
gradient needs none; it is only added to the gradients of the map's other readers, as in
squeeze-and-excitation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .nodes import is_map, value


def position_mean(input: Tensor, dims: list[int]) -> Tensor:
    """``input.mean(dims, keepdim=True)`` and its gradient, both the same to the bit. For half
    types, whose mean is taken in float, PyTorch's own mean runs: it casts the gradient only once it
    is expanded."""
    if input.dtype == torch.float16 or input.dtype == torch.bfloat16:
        return input.mean(dims, keepdim=True)
    count = 1
    for d in dims:
        count *= input.size(d)
    return input.sum(dims, keepdim=True, dtype=input.dtype) / count


_MEANS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}


_MAX_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def rewrite_pooling(graph: fx.Graph) -> None:
    """Replaces means over positions by `position_mean`, and max pools by one that saves one byte
    for each value of its result."""
    for node in list(graph.nodes):
        if not node.args or not is_map(value(node.args[0])):
            continue
        dims, options = _mean_dims(node), _max_options(node)
        if dims is None and options is None:
            continue
        with graph.inserting_before(node):
            function, rest = position_mean, (dims,)
            # PyTorch's max pool saves its input and eight bytes for each value of its result.
            if dims is None:
                function, rest = torch.ops.fusedconvbn.max_pool2d, options
            pooled = graph.call_function(function, (node.args[0], *rest))
        pooled.meta = node.meta
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments after the first, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | node.kwargs


def _mean_dims(node: fx.Node) -> list[int] | None:
    if node.target in _MEANS:
        number, size = _MEANS[node.target], _given(node, "output_size").get("output_size")
        return list(range(-number, 0)) if size in (1, (1,) * number, [1] * number) else None
    if node.target in ("mean", torch.mean):
        given = _given(node, "dim", "keepdim")
        dims, plain = given.get("dim"), given.keys() == {"dim", "keepdim"}
        if plain and given["keepdim"] is True and isinstance(dims, (tuple, list)):
            return list(dims) if dims and all(isinstance(d, int) for d in dims) else None
    return None


def _max_options(node: fx.Node) -> tuple[Any, ...] | None:
    if node.target not in (F.max_pool2d, torch.max_pool2d) or value(node.args[0]).dim() != 4:
        return None
    given = _given(node, *_MAX_OPTIONS, "return_indices")
    if given.pop("return_indices", False) is not False:
        return None
    options = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, **given}
    ceil_mode = options.pop("ceil_mode")
    lists = [_as_list(options.pop(name, None)) for name in _MAX_OPTIONS[:-1]]
    if options or None in lists or not isinstance(ceil_mode, bool):
        return None
    return (*lists, ceil_mode)


def _as_list(value: object) -> list[int] | None:
    """Options of a pool as a list of one value for each of two dimensions; [] for None, with which
    the stride is the kernel's size; None for anything else."""
    values = [value, value] if isinstance(value, int) else [] if value is None else value
    is_list = isinstance(values, (tuple, list)) and all(isinstance(v, int) for v in values)
    return list(values) if is_list and len(values) in (0, 1, 2) else None
