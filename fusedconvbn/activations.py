"""The one list of the activations that the operators know, and of the ways to write each of
them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Activation:
    """An activation of the operators.

    Attributes:
        name: the operators' name, without a parameter.
        module: its class in ``torch.nn``.
        calls: the functions, and the names of the methods of a tensor, that compute it.
        parameter: the name of its number, as the module's attribute and the functions' argument; ""
            where it has none.
        default: that number where none is given.
        options: the module's attributes, and the functions' keyword arguments, that select it.
    """

    name: str
    module: type[nn.Module]
    calls: tuple[Callable[..., Any] | str, ...] = ()
    parameter: str = ""
    default: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def spelled(self, parameter: float) -> str:
        """``"leaky_relu(0.2)"``; the name alone for an activation without a parameter."""
        return f"{self.name}({float(parameter)})" if self.parameter else self.name


# In the order of csrc's ActivationKind: a packed chain has the index of an activation.
_ALL = (
    Activation("none", nn.Identity),
    Activation("relu", nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    Activation("relu6", nn.ReLU6, (F.relu6, torch.ops.aten.relu6)),
    Activation(
        "leaky_relu", nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_), "negative_slope", default=0.01
    ),
    Activation("elu", nn.ELU, (F.elu, F.elu_), "alpha", default=1.0),
    Activation("silu", nn.SiLU, (F.silu, torch.ops.aten.silu)),
    Activation("hardswish", nn.Hardswish, (F.hardswish,)),
    Activation("gelu", nn.GELU, (F.gelu,), options={"approximate": "none"}),
    Activation("gelu_tanh", nn.GELU, (F.gelu,), options={"approximate": "tanh"}),
    Activation("mish", nn.Mish, (F.mish,)),
    Activation(
        "sigmoid",
        nn.Sigmoid,
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
    ),
    Activation("tanh", nn.Tanh, (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_")),
)
ACTIVATIONS = {activation.name: activation for activation in _ALL}

_SPELLING = re.compile(
    r"(?P<name>\w+)(\((?P<parameter>-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\))?", re.ASCII
)


def parse_activation(name: str) -> tuple[str, float | None]:
    """The name without its parameter, and the parameter or None: ``"leaky_relu", 0.2`` for
    ``"leaky_relu(0.2)"``.

    Raises:
        ValueError: the operators know no such activation.
    """
    parts = _SPELLING.fullmatch(name)
    if parts and parts["name"] in ACTIVATIONS:
        if parts["parameter"] is None:
            return parts["name"], None
        parameter = float(parts["parameter"])
        if ACTIVATIONS[parts["name"]].parameter and math.isfinite(parameter):
            return parts["name"], parameter
    raise _unknown(name)


def activation_name(activation: str | nn.Module | None) -> str:
    """The operators' name of an activation: ``"none"`` for None, ``"leaky_relu(0.2)"`` for
    ``nn.LeakyReLU(0.2)``.

    Raises:
        ValueError: the operators know no such activation, or its class has a ``forward`` of its
            own.
    """
    if activation is None:
        return "none"
    if isinstance(activation, str):
        parse_activation(activation)
        return activation
    for known in _ALL:
        if (
            isinstance(activation, known.module)
            and type(activation).forward is known.module.forward
            and all(getattr(activation, name) == value for name, value in known.options.items())
        ):
            parameter = getattr(activation, known.parameter) if known.parameter else known.default
            name = known.spelled(parameter)
            parse_activation(name)  # refuses a parameter that is not finite
            return name
    raise _unknown(activation)


def activation_module(name: str) -> nn.Module:
    """The module of an activation: the inverse of :func:`activation_name`.

    Raises:
        ValueError: the operators know no such activation.
    """
    base, parameter = parse_activation(name)
    known = ACTIVATIONS[base]
    if parameter is None:
        return known.module(**known.options)
    return known.module(parameter)


def _unknown(activation: Any) -> ValueError:
    names = ", ".join(map(repr, ACTIVATIONS))
    with_parameter = ", ".join(f"'{a.name}({a.parameter})'" for a in _ALL if a.parameter)
    return ValueError(
        f"expected activation None, one of {names}, {with_parameter}, or a module of one of these "
        f"kinds, got {activation!r}"
    )
