"""Recognises convolutions, batch norms, activations and concatenations among the calls of a
captured graph, however they were written."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..activations import ACTIVATIONS, Activation
from ..batch_norm import pack_batch_norm
from ..chain import Conv, Norm, Prelu, pack
from .nodes import ints, is_map, named_arguments, value

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
MUL = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
CAT = (torch.cat, torch.concat, torch.concatenate)
ACTIVATION_CALLS: dict[Any, list[Activation]] = {}  # by the functions and methods that compute them
for _activation in ACTIVATIONS.values():
    for _call in _activation.calls:
        ACTIVATION_CALLS.setdefault(_call, []).append(_activation)
_PRELUS = (F.prelu, torch.prelu, "prelu")


def conv_of(node: fx.Node) -> tuple[fx.Node, Conv] | None:
    """The input and the convolution of a call of F.conv* or F.conv_transpose*."""
    transposed = node.target in _TRANSPOSED
    dims = (_TRANSPOSED if transposed else CONVOLUTIONS).get(node.target)
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
    given = named_arguments(node, *names, **{n: d for n, d in defaults.items() if n in names})
    if given is None or not all(isinstance(given[n], fx.Node) for n in ("input", "weight")):
        return None
    if not (
        is_map(value(given["input"])) and is_map(value(given["weight"])) and is_map(value(node))
    ):
        return None
    if value(given["input"]).dim() != dims + 2 or type(given["groups"]) is not int:
        return None
    lists = [
        ints(given.get(n, 0), dims) for n in ("stride", "padding", "dilation", "output_padding")
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
    """A batch norm that is synchronised, or whose running statistics are the average over all
    batches. capture.py puts this call into a graph, as the module's own forward cannot be
    captured."""
    buffers, _, packed_momentum, _ = pack_batch_norm(
        training, momentum, running_mean, running_var, num_batches_tracked
    )
    norm = Norm(
        weight,
        bias,
        eps=eps,
        buffers=buffers,
        momentum=packed_momentum,
        training=training,
        group=process_group,
    )
    return torch.ops.fusedconvbn.conv_bn_chain(*pack(input, [norm]).call(()))


NORMS: dict[Any, tuple[str, ...]] = {
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
    return node.op == "call_function" and node.target in NORMS


def is_training(node: fx.Node) -> bool:
    """Whether a node is a batch norm that uses the statistics of the batch."""
    found = norm_of(node) if is_norm(node) else ""
    return not isinstance(found, str) and found[1].training


def norm_of(node: fx.Node) -> tuple[fx.Node, Norm] | str:
    """The input and the link of a batch norm, or why it cannot be a link."""
    defaults: dict[str, Any] = dict(
        running_mean=None, running_var=None, num_batches_tracked=None, weight=None, bias=None
    )
    names = NORMS[node.target]
    defaults = {n: d for n, d in defaults.items() if n in names}
    given = named_arguments(
        node, *names, **{**defaults, "training": False, "momentum": 0.1, "eps": 1e-5}
    )
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
    counter = given.get("num_batches_tracked")
    buffers, _, momentum, _ = pack_batch_norm(training, momentum, *running, counter)
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
    """Whether t is a number, or a symbol that Dynamo made of a number that changed."""
    return isinstance(t, (int, float)) or isinstance(value(t), torch.SymFloat)


def _fits(vector: Any, map: Tensor) -> bool:
    wider = map.dtype in (torch.bfloat16, torch.float16) and vector.dtype == torch.float32
    return is_map(vector) and vector.device == map.device and (vector.dtype == map.dtype or wider)


def activation_of(node: fx.Node) -> tuple[fx.Node, str] | None:
    """The input and the operators' name of an activation such as ``F.leaky_relu(x, 0.2)``."""
    kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    x, *rest = node.args if node.args else (kwargs.pop("input", None),)
    if not isinstance(x, fx.Node):
        return None
    rest = [a for a in rest if not isinstance(a, bool)]  # inplace

    def given(index: int, *names: str, default: Any = None) -> Any:
        found = next((kwargs[n] for n in names if n in kwargs), default)
        return rest[index] if len(rest) > index else found

    target, name = node.target, None
    if target in ACTIVATION_CALLS:
        name = _named(ACTIVATION_CALLS[target], rest, kwargs)
    elif target in (F.hardtanh, F.hardtanh_):
        name = _clamped(given(0, "min_val", default=-1.0), given(1, "max_val", default=1.0))
    elif target in (torch.clamp, torch.clamp_, torch.clip, "clamp", "clamp_", "clip", "clip_"):
        name = _clamped(given(0, "min"), given(1, "max"))
    elif target in (torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_"):
        name = _clamped(given(0, "min"), None)
    return None if name is None else (x, name)


def prelu_of(node: fx.Node) -> tuple[fx.Node, Prelu] | None:
    """The input and the link of a PReLU."""
    given = named_arguments(node, "input", "weight") if node.target in _PRELUS else None
    if given is None or not all(is_map(value(t)) for t in (*given.values(), node)):
        return None
    x, slopes = (value(t) for t in given.values())
    alike = _fits(slopes, x) and value(node).dtype == x.dtype
    fits = alike and x.dim() >= 2 and slopes.dim() == 1
    return (given["input"], Prelu(given["weight"])) if fits else None


def _named(
    candidates: Sequence[Activation], rest: Sequence[Any], kwargs: Mapping[str, Any]
) -> str | None:
    """The name of the candidate that a call with these arguments computes. A call without arguments
    computes the first candidate."""
    for known in candidates:
        names = (known.parameter,) if known.parameter else tuple(known.options)
        given = {**candidates[0].options, **dict(zip(names, rest, strict=False)), **kwargs}
        if len(rest) > len(names) or not given.keys() <= set(names):
            return None
        parameter = given.pop(known.parameter, known.default)
        if not isinstance(parameter, (int, float)) or not math.isfinite(parameter):
            return None
        if given == known.options:
            return known.spelled(parameter)
    return None


def _clamped(low: Any, high: Any) -> str | None:
    if isinstance(low, fx.Node) or isinstance(high, fx.Node) or low != 0:
        return None
    return {None: "relu", math.inf: "relu", 6: "relu6"}.get(high)


def parts_of(node: fx.Node) -> list[fx.Node] | None:
    """The tensors of a concatenation of channels."""
    if node.op != "call_function" or node.target not in CAT or not is_map(value(node)):
        return None
    given = named_arguments(node, "tensors", "dim", dim=0)
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
