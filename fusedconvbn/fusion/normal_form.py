"""A captured graph written so that each thing is there in one form: what writes in place, what does nothing, padding by name, and
activations written by hand."""

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..activations import ACTIVATIONS
from .accesses import Accesses
from .calls import (
    ADD,
    CONVOLUTIONS,
    MUL,
    activation_of,
    arguments,
    ints,
    is_map,
    mutated,
    storage,
    value,
    writes_in_place,
)

_DIV = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
    *(F.alpha_dropout, F.feature_alpha_dropout, torch.feature_dropout),
)
_HARDSIGMOID = (F.hardsigmoid,)
_SOFTPLUS = (F.softplus,)
_ERF = (torch.erf, torch.special.erf, "erf")


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
    _name_activations(graph)


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
    given = arguments(node, "input", "p", "training", "inplace", p=0.5, training=True)
    given = given or arguments(node, "input", "p", "train")
    return given is not None and (
        given["p"] == 0 or given.get("training", given.get("train")) is False
    )


def _pad_same(graph: fx.Graph) -> None:
    """Writes a convolution's padding by name in numbers, behind F.pad where it is not the same on both sides."""
    for node in list(graph.nodes):
        dims = CONVOLUTIONS.get(node.target) if node.op == "call_function" else None
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = arguments(node, *names, bias=None, stride=1, dilation=1, groups=1) if dims else None
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


# ------------------------------------------------------------------------------- activations written by hand


def _only_argument(node: Any, targets: Iterable[Any]) -> Any:
    """x of f(x), where f is one of `targets`."""
    if not isinstance(node, fx.Node) or node.target not in targets:
        return None
    rest = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    x = node.args[0] if node.args else node.kwargs.get("input")
    return None if rest or any(not isinstance(a, bool) for a in node.args[1:]) else x


def _is_plus(node: Any, x: fx.Node, number: float) -> bool:
    """x + number"""
    if (
        not isinstance(node, fx.Node)
        or node.target not in ADD
        or node.kwargs
        or len(node.args) != 2
    ):
        return False
    a, b = node.args
    return (a is x and b == number) or (b is x and a == number)


class _Product:
    """A product of nodes and a number, taken apart."""

    def __init__(self, node: Any) -> None:
        self.number, self.factors, self.nodes = 1.0, [], []
        self._take(node)

    def _take(self, node: Any, divide: bool = False) -> None:
        if isinstance(node, (int, float)) and node != 0:
            self.number *= 1 / node if divide else node
        elif (
            isinstance(node, fx.Node)
            and node.target in (*MUL, *_DIV)
            and len(node.args) == 2
            and not node.kwargs
        ):
            a, b = node.args
            if node.target in _DIV and not isinstance(b, (int, float)):
                self.factors.append(node)
                return
            self.nodes.append(node)
            self._take(a)
            self._take(b, divide=node.target in _DIV)
        else:
            self.factors.append(node)


def _by_hand(product: _Product) -> tuple[fx.Node, str, list[fx.Node]] | None:
    """x, the name and the nodes of an activation that is x·g(x) times a number."""
    if len(product.factors) != 2 or not all(isinstance(f, fx.Node) for f in product.factors):
        return None

    def near(number: float) -> bool:
        return math.isclose(product.number, number, rel_tol=1e-6)

    for x, g in (product.factors, product.factors[::-1]):
        inner = g.args[0] if g.args else None
        activation = activation_of(g)
        if near(1) and activation == (x, "sigmoid"):
            return x, "silu", [g]
        if near(1) and _only_argument(g, _HARDSIGMOID) is x:
            return x, "hardswish", [g]
        if near(1) and activation == (inner, "tanh") and _only_argument(inner, _SOFTPLUS) is x:
            return x, "mish", [g, inner]
        if near(1 / 6) and activation == (inner, "relu6") and _is_plus(inner, x, 3):
            return x, "hardswish", [g, inner]
        # x·(1 + erf(x/√2))/2
        if near(0.5) and g.target in ADD and len(g.args) == 2 and 1 in g.args:
            erf = next(a for a in g.args if a != 1)
            scaled = _only_argument(erf, _ERF)
            if isinstance(scaled, fx.Node):
                parts = _Product(scaled)
                if parts.factors == [x] and math.isclose(
                    parts.number, math.sqrt(0.5), rel_tol=1e-6
                ):
                    return x, "gelu", [g, erf, *parts.nodes]
    return None


def _name_activations(graph: fx.Graph) -> None:
    """Puts ``F.silu(x)`` in the place of ``x * sigmoid(x)``, and so for the others that have no function of their own in a
    model."""
    accesses = Accesses(graph)
    for root in list(graph.nodes):
        if (
            root.op not in ("call_function", "call_method")
            or root.target not in (*MUL, *_DIV)
            or not is_map(value(root))
        ):
            continue
        product = _Product(root)
        found = _by_hand(product)
        if found is None or not all(accesses.may_be_lost(root, t) for t in mutated(root)):
            continue
        x, name, nodes = found
        inner = {*nodes, *product.nodes} - {root}
        if not {user for node in inner for user in node.users} <= {*inner, root}:
            continue  # read by others too
        with graph.inserting_before(root):
            named = graph.call_function(ACTIVATIONS[name].calls[0], (x,))
        named.meta = {**root.meta, "stands_for": [node.name for node in (*inner, root)]}
        root.replace_all_uses_with(named)
        for node in sorted({*inner, root}, reverse=True):
            graph.erase_node(node)
