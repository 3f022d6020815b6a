"""Pooling in fused models, with PyTorch's own numbers.

The gradient of a mean over positions is one value for all of them. PyTorch divides it by their number where it is a map already,
and so makes one, which is then added to that of the map's other readers (squeeze-and-excitation): divided before it is
expanded, no map is made. Max pooling keeps its input and eight bytes for each value of its result, of which one is enough.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .tracing import Guards

_MEAN_MODULES = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_MEAN_FUNCTIONS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
_MAX_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def position_mean(input: Tensor, dims: list[int]) -> Tensor:
    """``input.mean(dims, keepdim=True)``, to the bit, and so its gradient. Of half types it is that: their mean is taken in
    float, and no gradient is cast before it is expanded."""
    if input.dtype == torch.float16 or input.dtype == torch.bfloat16:
        return input.mean(dims, keepdim=True)
    count = 1
    for d in dims:
        count *= input.size(d)
    return input.sum(dims, keepdim=True, dtype=input.dtype) / count


def max_pool2d(
    input: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Tensor:
    """``F.max_pool2d``, of which one byte is kept for each value of the result. A compiler keeps no more by itself."""
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
    return torch.ops.fusedconvbn.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode
    )


def rewrite_pooling(graph: fx.Graph, modules: dict[str, nn.Module], guards: Guards) -> None:
    """Puts `position_mean` and `max_pool2d` in the place of what they stand for."""
    for node in list(graph.nodes):
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        module = modules.get(node.target) if node.op == "call_module" else None
        dims, options = _mean_dims(node, module), _max_options(node, module)
        if dims is None and options is None:
            continue
        if module is not None:
            guards.add(tuple(node.target.split(".")), module)
        with graph.inserting_before(node):
            function, rest = (max_pool2d, options) if dims is None else (position_mean, (dims,))
            pooled = graph.call_function(function, (node.args[0], *rest))
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments behind the first, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | node.kwargs


def _mean_dims(node: fx.Node, module: nn.Module | None) -> list[int] | None:
    if type(module) in _MEAN_MODULES:
        return _last(_MEAN_MODULES[type(module)], module.output_size)
    if node.op == "call_function" and node.target in _MEAN_FUNCTIONS:
        given = _given(node, "output_size")
        return _last(_MEAN_FUNCTIONS[node.target], given.get("output_size"))
    if node.target in ("mean", torch.mean):
        given = _given(node, "dim", "keepdim")
        dims, plain = given.get("dim"), given.keys() == {"dim", "keepdim"}
        if plain and given["keepdim"] is True and isinstance(dims, (tuple, list)):
            return list(dims) if all(isinstance(d, int) for d in dims) else None
    return None


def _last(number: int, size: object) -> list[int] | None:
    """The last dimensions, so many, where each is pooled to one value."""
    return list(range(-number, 0)) if size in (1, (1,) * number, [1] * number) else None


def _max_options(node: fx.Node, module: nn.Module | None) -> tuple[Any, ...] | None:
    if type(module) is nn.MaxPool2d:
        given = {name: getattr(module, name) for name in (*_MAX_OPTIONS, "return_indices")}
    elif node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
        given = _given(node, *_MAX_OPTIONS, "return_indices")
    else:
        return None
    if given.pop("return_indices", False) is not False:
        return None
    options = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, **given}
    ceil_mode = options.pop("ceil_mode")
    lists = [_as_list(options.pop(name, None)) for name in _MAX_OPTIONS[:-1]]
    if options or None in lists or not isinstance(ceil_mode, bool):
        return None
    return (*lists, ceil_mode)


def _as_list(value: object) -> list[int] | None:
    """One value for both dimensions, or one for each; none for a stride that is the kernel's size."""
    values = [value, value] if isinstance(value, int) else [] if value is None else value
    is_list = isinstance(values, (tuple, list)) and all(isinstance(v, int) for v in values)
    return list(values) if is_list and len(values) in (0, 1, 2) else None
