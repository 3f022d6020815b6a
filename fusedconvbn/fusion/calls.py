"""What the calls of a captured graph are: convolutions, batch norms, activations, however they were written."""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from ..chain import PARAMETERS, Conv, Norm, Prelu, pack

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
MUL = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_DIV = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
_CAT = (torch.cat, torch.concat, torch.concatenate)
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout),
    *(F.alpha_dropout, F.feature_alpha_dropout, torch.feature_dropout),
)
_IN_PLACE = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor),
)
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((F.relu6, torch.ops.aten.relu6), "relu6"),
    **dict.fromkeys((F.silu, torch.ops.aten.silu), "silu"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid"),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "tanh"),
    F.hardswish: "hardswish",
    F.mish: "mish",
}
_PRELUS = (F.prelu, torch.prelu, "prelu")
_HARDSIGMOID = (F.hardsigmoid,)
_SOFTPLUS = (F.softplus,)
_ERF = (torch.erf, torch.special.erf, "erf")


def value(node: Any) -> Any:
    """What a node's value was when the graph was captured: a stand-in for a tensor, as a rule."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def storage(node: Any) -> int | None:
    """The identity of the memory that a node's value lies in: views and what is done in place share it."""
    t = _local(value(node))
    return t.untyped_storage()._cdata if isinstance(t, FakeTensor) else None


def _local(t: Any) -> Any:
    """What a process has of a DTensor that is replicated."""
    placements = getattr(t, "placements", None)
    return t._local_tensor if placements and all(p.is_replicate() for p in placements) else t


def is_map(t: Any) -> bool:
    """Whether the operators take such a tensor."""
    return isinstance(_local(t), FakeTensor) and t.dtype in _FLOATS and t.layout == torch.strided


def arguments(node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any] | None:
    """The arguments of a call by name; None where it has others."""
    if len(node.args) > len(names):
        return None
    given = defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
    return given if given.keys() <= set(names) and names[0] in given else None


def _ints(given: Any, count: int) -> list[int] | None:
    values = list(given) if isinstance(given, (tuple, list)) else [given] * count
    values = values * count if len(values) == 1 else values
    return values if len(values) == count and all(type(v) is int for v in values) else None


def conv_of(node: fx.Node) -> tuple[fx.Node, Conv] | None:
    """The input and the convolution of a call of F.conv* or F.conv_transpose*."""
    transposed = node.target in _TRANSPOSED
    dims = (_TRANSPOSED if transposed else _CONVOLUTIONS).get(node.target)
    if dims is None:
        return None
    rest = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    names = ("input", "weight", "bias", "stride", "padding", *rest)
    defaults = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "output_padding": 0,
        "groups": 1,
        "dilation": 1,
    }
    given = arguments(node, *names, **{n: d for n, d in defaults.items() if n in names})
    if given is None or not all(isinstance(given[n], fx.Node) for n in ("input", "weight")):
        return None
    if not (
        is_map(value(given["input"])) and is_map(value(given["weight"])) and is_map(value(node))
    ):
        return None
    if value(given["input"]).dim() != dims + 2 or type(given["groups"]) is not int:
        return None
    lists = [
        _ints(given.get(n, 0), dims) for n in ("stride", "padding", "dilation", "output_padding")
    ]
    if None in lists:
        return None
    stride, padding, dilation, output_padding = lists
    options = (stride, padding, dilation, transposed, output_padding, given["groups"])
    return given["input"], Conv(given["weight"], given["bias"], *options)


def normalise(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    process_group: str = "",
) -> Tensor:
    """A batch norm whose module has no call of F.batch_norm to capture: one that is synchronised, or whose statistics are the
    average over all batches. (capture.py puts it there.)"""
    buffers = [t for t in (running_mean, running_var, num_batches_tracked) if t is not None]
    momentum = math.nan if momentum is None else momentum
    norm = Norm(weight, bias, None, eps, buffers=buffers, momentum=momentum, training=training)
    norm.group = process_group
    return torch.ops.fusedconvbn.conv_bn_chain(*pack(input, [norm]).call(()))


_NORMS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
        "cudnn_enabled",
    ),
    normalise: (
        *("input", "running_mean", "running_var", "num_batches_tracked", "weight", "bias"),
        *("training", "momentum", "eps", "process_group"),
    ),
}


def is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _NORMS


def is_training(node: fx.Node) -> bool:
    """Whether it is a batch norm that takes the statistics of the batch."""
    found = norm_of(node) if is_norm(node) else ""
    return not isinstance(found, str) and found[1].training


def norm_of(node: fx.Node) -> tuple[fx.Node, Norm] | str:
    """The input and the link of a batch norm, or why it cannot be one."""
    defaults: dict[str, Any] = dict(
        running_mean=None, running_var=None, num_batches_tracked=None, weight=None, bias=None
    )
    names = _NORMS[node.target]
    defaults = {n: d for n, d in defaults.items() if n in names}
    given = arguments(node, *names, **{**defaults, "training": False, "momentum": 0.1, "eps": 1e-5})
    if given is None or not is_map(value(given["input"])) or not is_map(value(node)):
        return "its input is no dense tensor of floating point numbers"
    running = [given["running_mean"], given["running_var"]]
    training, momentum, eps = given["training"], given["momentum"], given["eps"]
    if (
        not isinstance(training, bool)
        or not _is_number(eps)
        or (isinstance(eps, (int, float)) and not eps > 0)
    ):
        return "its mode is no constant, or its eps is not above 0"
    if momentum is not None and not _is_number(momentum):
        return "its momentum is no number"
    if (running[0] is None) != (running[1] is None):
        return "it has one of running_mean and running_var"
    if not training and running[0] is None:
        return "it has no running statistics"
    for t in (*running, given["weight"], given["bias"]):
        if t is not None and not _fits(value(t), value(given["input"])):
            return "its parameters are of another dtype or device than its input"
    buffers = [b for b in (*running, given.get("num_batches_tracked")) if b is not None]
    momentum = math.nan if momentum is None else momentum
    link = Norm(
        given["weight"],
        given["bias"],
        eps=eps,
        buffers=buffers,
        momentum=momentum,
        training=training,
        group=given.get("process_group", ""),
    )
    return given["input"], link


def _is_number(t: Any) -> bool:
    """A constant, or what was one until it changed."""
    return isinstance(t, (int, float)) or isinstance(value(t), torch.SymFloat)


def _fits(vector: Any, map: Tensor) -> bool:
    wider = map.dtype in (torch.bfloat16, torch.float16) and vector.dtype == torch.float32
    return is_map(vector) and vector.device == map.device and (vector.dtype == map.dtype or wider)


def activation_of(node: fx.Node) -> tuple[fx.Node, str] | None:
    """The input and the operator's name of an activation, as of ``F.leaky_relu(x, 0.2)``."""
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    x, *rest = node.args if node.args else (kwargs.pop("input", None),)
    if not isinstance(x, fx.Node):
        return None
    rest = [a for a in rest if not isinstance(a, bool)]  # inplace

    def given(index: int, *names: str, default: Any = None) -> Any:
        found = next((kwargs[n] for n in names if n in kwargs), default)
        return rest[index] if len(rest) > index else found

    target, name = node.target, None
    if target in _ACTIVATIONS:
        name = None if rest or kwargs else _ACTIVATIONS[target]
    elif target in (F.leaky_relu, F.leaky_relu_):
        name = _with_parameter("leaky_relu", given(0, "negative_slope", default=0.01))
    elif target in (F.elu, F.elu_) and kwargs.keys() <= {"alpha"} and len(rest) < 2:
        name = _with_parameter("elu", given(0, "alpha", default=1.0))
    elif target is F.gelu:
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(given(0, "approximate", default="none"))
    elif target in (F.hardtanh, F.hardtanh_):
        name = _clamped(given(0, "min_val", default=-1.0), given(1, "max_val", default=1.0))
    elif target in (torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip", "clip_"):
        name = _clamped(given(0, "min"), given(1, "max"))
    elif target in (torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"):
        name = _clamped(given(0, "min"), None)
    return None if name is None else (x, name)


def prelu_of(node: fx.Node) -> tuple[fx.Node, Prelu] | None:
    """The input and the link of a PReLU."""
    given = arguments(node, "input", "weight") if node.target in _PRELUS else None
    if given is None or not all(is_map(value(t)) for t in (*given.values(), node)):
        return None
    x, slopes = (value(t) for t in given.values())
    plain = x.dtype == slopes.dtype == value(node).dtype and x.dim() >= 2 and slopes.dim() == 1
    return (given["input"], Prelu(given["weight"])) if plain else None


def _with_parameter(base: str, parameter: Any) -> str | None:
    number = isinstance(parameter, (int, float)) and math.isfinite(parameter)
    return (
        (f"{base}({float(parameter)})" if parameter != PARAMETERS[base] else base)
        if number
        else None
    )


def _clamped(low: Any, high: Any) -> str | None:
    if isinstance(low, fx.Node) or isinstance(high, fx.Node) or low != 0:
        return None
    return {None: "relu", math.inf: "relu", 6: "relu6"}.get(high)


# ------------------------------------------------------------------------------- activations written by hand

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "gelu": F.gelu,
}


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


def name_activations(graph: fx.Graph) -> None:
    """Puts ``F.silu(x)`` in the place of ``x * sigmoid(x)``, and so for the others that have no function of their own in a
    model."""
    for root in list(graph.nodes):
        if (
            root.op not in ("call_function", "call_method")
            or root.target not in (*MUL, *_DIV)
            or not is_map(value(root))
        ):
            continue
        product = _Product(root)
        found = _by_hand(product)
        if found is None:
            continue
        x, name, nodes = found
        inner = {*nodes, *product.nodes} - {root}
        if not {user for node in inner for user in node.users} <= {*inner, root}:
            continue  # read by others too
        with graph.inserting_before(root):
            named = graph.call_function(_FUNCTIONS[name], (x,))
        named.meta = {**root.meta, "stands_for": [node.name for node in (*inner, root)]}
        root.replace_all_uses_with(named)
        for node in sorted({*inner, root}, reverse=True):
            graph.erase_node(node)


# ----------------------------------------------------------------------------------------- writes and copies


def mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # may write to any buffer
        return [
            n
            for n in node.all_input_nodes
            if isinstance(t := value(n), Tensor) and not t.requires_grad
        ]
    written = [node.kwargs["out"]] if isinstance(node.kwargs.get("out"), fx.Node) else []
    if is_norm(node):
        names = _NORMS[node.target]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        training = given.get("training", False)
        names = ("running_mean", "running_var", "num_batches_tracked") if training else ()
        return [given[n] for n in names if isinstance(given.get(n), fx.Node)]
    if writes_in_place(node) or node.target is operator.setitem:
        written += [a for a in node.args[:1] if isinstance(a, fx.Node)]
    return written


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node writes to its first argument, and returns it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    if node.target in _IN_PLACE or named or node.kwargs.get("inplace") is True:
        return True
    return any(a is True for a in node.args[1:]) and node.target in (
        *_ACTIVATIONS,
        F.leaky_relu,
        F.elu,
        F.hardtanh,
    )


def parts_of(node: fx.Node) -> list[fx.Node] | None:
    """The tensors of a concatenation of channels."""
    if node.op != "call_function" or node.target not in _CAT or not is_map(value(node)):
        return None
    given = arguments(node, "tensors", "dim", dim=0)
    if given is None or given["dim"] not in (1, 1 - value(node).dim()):
        return None
    parts = given["tensors"]
    alike = isinstance(parts, (list, tuple)) and all(
        is_map(value(p))
        and value(p).dtype == value(node).dtype
        and value(p).dim() == value(node).dim()
        for p in parts
    )
    return list(parts) if alike else None


def is_copy(node: fx.Node) -> bool:
    """Whether a node returns its input as it is: dropout that drops nothing."""
    if node.target not in _DROPOUTS:
        return False
    given = arguments(node, "input", "p", "training", "inplace", p=0.5, training=True)
    given = given or arguments(node, "input", "p", "train")
    return given is not None and (
        given["p"] == 0 or given.get("training", given.get("train")) is False
    )


def plain(graph: fx.Graph) -> None:
    """Makes the readers of a tensor that was written to in place readers of the result, and takes out what does nothing, so that
    each value has one node."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        x = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(x, fx.Node):
            continue
        if is_copy(node):
            node.replace_all_uses_with(x)
            graph.erase_node(node)
        elif writes_in_place(node) and storage(node) is not None and storage(node) == storage(x):
            x.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])  # noqa: B023
    _pad_same(graph)
    name_activations(graph)


def _pad_same(graph: fx.Graph) -> None:
    """Writes a convolution's padding by name in numbers, behind F.pad where it is not the same on both sides."""
    for node in list(graph.nodes):
        dims = _CONVOLUTIONS.get(node.target) if node.op == "call_function" else None
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = arguments(node, *names, bias=None, stride=1, dilation=1, groups=1) if dims else None
        if (
            given is None
            or not isinstance(given.get("padding"), str)
            or not is_map(value(given["weight"]))
        ):
            continue
        dilation = _ints(given["dilation"], dims)
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
