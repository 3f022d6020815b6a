"""Activations that are written by hand, such as ``x * sigmoid(x)``."""

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..activations import ACTIVATIONS
from .accesses import Accesses, mutated
from .calls import ADD, MUL, activation_of
from .nodes import is_map, value

_DIV = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")


_HARDSIGMOID = (F.hardsigmoid,)


_SOFTPLUS = (F.softplus,)


_ERF = (torch.erf, torch.special.erf, "erf")


def _only_argument(node: Any, targets: Iterable[Any]) -> Any:
    """x, where a node is f(x) with f among `targets`."""
    if not isinstance(node, fx.Node) or node.target not in targets:
        return None
    rest = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
    x = node.args[0] if node.args else node.kwargs.get("input")
    return None if rest or any(not isinstance(a, bool) for a in node.args[1:]) else x


def _is_plus(node: Any, x: fx.Node, number: float) -> bool:
    """Whether a node is x + number."""
    if (
        not isinstance(node, fx.Node)
        or node.target not in ADD
        or node.kwargs
        or len(node.args) != 2
    ):
        return False
    a, b = node.args
    return bool((a is x and b == number) or (b is x and a == number))


class _Product:
    """The factors of a product of nodes, its number, and the nodes that compute it."""

    def __init__(self, node: Any) -> None:
        self.number = 1.0
        self.factors: list[Any] = []
        self.nodes: list[Any] = []
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
    """The input x, the name and the inner nodes of an activation that is a number times x·g(x)."""
    if len(product.factors) != 2 or not all(isinstance(f, fx.Node) for f in product.factors):
        return None

    def is_times(number: float) -> bool:
        return math.isclose(product.number, number, rel_tol=1e-6)

    for x, g in (product.factors, product.factors[::-1]):
        inner = g.args[0] if g.args else None
        activation = activation_of(g)
        if is_times(1) and activation == (x, "sigmoid"):
            return x, "silu", [g]
        if is_times(1) and _only_argument(g, _HARDSIGMOID) is x:
            return x, "hardswish", [g]
        if is_times(1) and activation == (inner, "tanh") and _only_argument(inner, _SOFTPLUS) is x:
            return x, "mish", [g, inner]
        if is_times(1 / 6) and activation == (inner, "relu6") and _is_plus(inner, x, 3):
            return x, "hardswish", [g, inner]
        # x·(1 + erf(x/√2))/2
        if is_times(0.5) and g.target in ADD and len(g.args) == 2 and 1 in g.args:
            erf = next(a for a in g.args if a != 1)
            scaled = _only_argument(erf, _ERF)
            if isinstance(scaled, fx.Node):
                parts = _Product(scaled)
                if parts.factors == [x] and math.isclose(
                    parts.number, math.sqrt(0.5), rel_tol=1e-6
                ):
                    return x, "gelu", [g, erf, *parts.nodes]
    return None


def name_activations(graph: fx.Graph) -> None:
    """Replaces ``x * sigmoid(x)`` by ``F.silu(x)``, and other activations written by hand
    likewise."""
    accesses = Accesses(graph.nodes)
    for root in list(graph.nodes):
        if (
            root.op not in ("call_function", "call_method")
            or root.target not in (*MUL, *_DIV)
            or not is_map(value(root))
        ):
            continue
        product = _Product(root)
        found = _by_hand(product)
        if found is None or not all(accesses.is_write_unseen(root, t) for t in mutated(root)):
            continue
        x, name, nodes = found
        inner = {*nodes, *product.nodes} - {root}
        if not {user for node in inner for user in node.users} <= {*inner, root}:
            continue  # read by others too
        with graph.inserting_before(root):
            function: Any = ACTIVATIONS[name].calls[0]
            named = graph.call_function(function, (x,))
        named.meta = {**root.meta, "stands_for": [node.name for node in (*inner, root)]}
        root.replace_all_uses_with(named)
        for node in sorted({*inner, root}, reverse=True):
            graph.erase_node(node)
