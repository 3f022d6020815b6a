"""A captured graph written so that each thing is there in one form: what writes in place, what does nothing, padding by name, and
activations written by hand."""

import torch
import torch.nn.functional as F
from torch import fx

from .accesses import writes_in_place
from .calls import ADD, CONVOLUTIONS
from .handwritten import name_activations
from .nodes import ints, is_map, named_arguments, storage, value

_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
    *(F.alpha_dropout, F.feature_alpha_dropout, torch.feature_dropout),
)


def to_normal_form(graph: fx.Graph) -> None:
    """Makes the readers of a tensor that was written to in place readers of the result, and takes out what does nothing, so that
    each value has one node."""
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
    """x of a sum of it and the number 0, with which a sum of branches begins, where it may stand for the sum: it is written in place,
    or nobody else reads x."""
    if node.target not in ADD or len(node.args) != 2 or node.kwargs:
        return None
    x, zero = node.args if isinstance(node.args[0], fx.Node) else node.args[::-1]
    nothing = type(zero) in (int, float) and zero == 0 and is_map(value(x))
    return x if nothing and (writes_in_place(node) or len(x.users) == 1) else None


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a node is dropout that returns its input as it is."""
    if node.target not in _DROPOUTS:
        return False
    given = named_arguments(node, "input", "p", "training", "inplace", p=0.5, training=True)
    given = given or named_arguments(node, "input", "p", "train")
    return given is not None and (
        given["p"] == 0 or given.get("training", given.get("train")) is False
    )


def _pad_same(graph: fx.Graph) -> None:
    """Writes a convolution's padding by name in numbers, behind F.pad where it is not the same on both sides."""
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
        total = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            ends = [end for t in reversed(total) for end in (0, t % 2)]
            with graph.inserting_before(node):
                padded = graph.call_function(F.pad, (given["input"], ends))
            x = value(given["input"])
            padded.meta = {
                **node.meta,
                "example_value": F.pad(x.detach(), ends) if is_map(x) else None,
            }
            given["input"] = padded
        node.args = tuple({**given, "padding": tuple(t // 2 for t in total)}[n] for n in names)
        node.kwargs = {}
