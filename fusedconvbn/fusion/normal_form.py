"""Brings a captured graph into one form: no readers of a tensor that was overwritten since, no
calls that do nothing, padding in numbers, and activations by their names."""

import torch
import torch.nn.functional as F
from torch import fx

from ..options import pad_after, same_padding
from .accesses import writes_in_place
from .calls import ADD, CONVOLUTIONS
from .handwritten import name_activations
from .nodes import ints, is_map, named_arguments, storage, value

_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
    *(F.alpha_dropout, F.feature_alpha_dropout, torch.feature_dropout),
)


def to_normal_form(graph: fx.Graph) -> None:
    """Gives each value one node: whoever reads a tensor after a call has written to it in place
    reads the result of that call, and calls that do nothing are removed."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        x = node.args[0] if node.args else node.kwargs.get("input")
        same = x if _drops_nothing(node) else _without_zero(node)
        if isinstance(same, fx.Node):
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif not isinstance(x, fx.Node):
            continue
        elif writes_in_place(node) and storage(node) is not None and storage(node) == storage(x):
            x.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023
    _pad_same(graph)
    name_activations(graph)


def _without_zero(node: fx.Node) -> fx.Node | None:
    """x, where a node is x + 0 (``sum`` of branches begins so) and x may take its place: the sum is
    computed in place, or nobody else reads x."""
    if node.target not in ADD or len(node.args) != 2 or node.kwargs:
        return None
    x, zero = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    nothing = type(zero) in (int, float) and zero == 0 and is_map(value(x))
    return x if nothing and (writes_in_place(node) or len(x.users) == 1) else None


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a node is a dropout that returns its input unchanged."""
    if node.target not in _DROPOUTS:
        return False
    given = named_arguments(node, "input", "p", "training", "inplace", p=0.5, training=True)
    given = given or named_arguments(node, "input", "p", "train")
    return given is not None and (
        given["p"] == 0 or given.get("training", given.get("train")) is False
    )


def _pad_same(graph: fx.Graph) -> None:
    """Writes a convolution's padding by name in numbers. Where it differs on the two sides, F.pad
    comes in front of the convolution."""
    for node in list(graph.nodes):
        dims = CONVOLUTIONS.get(node.target) if node.op == "call_function" else None
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = (
            named_arguments(node, *names, bias=None, stride=1, dilation=1, groups=1)
            if dims
            else None
        )
        if (
            given is None
            or not isinstance(given.get("padding"), str)
            or not is_map(value(given["weight"]))
        ):
            continue
        dilation = ints(given["dilation"], dims)
        kernel = value(given["weight"]).shape[2:]
        if dilation is None or not all(isinstance(k, int) for k in kernel):
            continue
        same = given["padding"] == "same"
        ends = same_padding(dilation, kernel) if same else [(0, 0)] * dims
        padding = tuple(before for before, _ in ends)
        if pad := pad_after(ends, padding):
            with graph.inserting_before(node):
                padded = graph.call_function(F.pad, (given["input"], pad))
            x = value(given["input"])
            padded.meta = {
                **node.meta,
                "example_value": F.pad(x.detach(), pad) if is_map(x) else None,
            }
            given["input"] = padded
        node.args = tuple({**given, "padding": padding}[n] for n in names)
        node.kwargs = {}
