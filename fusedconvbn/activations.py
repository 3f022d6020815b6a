"""The names of the activations that the operator takes, and those of `nn.Module`s."""

import math
import re
from collections.abc import Callable

from torch import nn

SPELLING = re.compile(
    r"(?P<base>\w+)(\((?P<parameter>-?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)\))?", re.ASCII
)

# nn.Module → the operator's name
_NAMES: dict[type[nn.Module], Callable[[nn.Module], str]] = {
    nn.Identity: lambda _: "none",
    nn.ReLU: lambda _: "relu",
    nn.ReLU6: lambda _: "relu6",
    nn.LeakyReLU: lambda m: f"leaky_relu({float(m.negative_slope)})",
    nn.ELU: lambda m: f"elu({float(m.alpha)})",
    nn.SiLU: lambda _: "silu",
    nn.Hardswish: lambda _: "hardswish",
    nn.GELU: lambda m: "gelu" if m.approximate == "none" else "gelu_tanh",
    nn.Mish: lambda _: "mish",
    nn.Sigmoid: lambda _: "sigmoid",
    nn.Tanh: lambda _: "tanh",
}

# the operator's name, without a parameter in parentheses → nn.Module; in the order of csrc/activation.h
MODULES: dict[str, Callable[..., nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation_name(activation: str | nn.Module | None) -> str:
    """The operator's name of an activation: ``"none"`` for None, ``"leaky_relu(0.2)"`` for ``nn.LeakyReLU(0.2)``.

    Raises:
        ValueError: it is no activation that the operator knows, or a subclass with a ``forward`` of its own.
    """
    if activation is None:
        return "none"
    if isinstance(activation, str):
        activation_module(activation)
        return activation
    for kind, name in _NAMES.items():
        if isinstance(activation, kind) and type(activation).forward is kind.forward:
            found = name(activation)
            activation_module(found)  # a parameter may be no finite number
            return found
    raise ValueError(
        f"expected activation None, one of {', '.join(map(repr, MODULES))}, 'leaky_relu(slope)', 'elu(alpha)', or "
        f"a module of one of these kinds, got {activation!r}"
    )


def activation_module(name: str) -> nn.Module:
    """The module of an activation of the operator: the inverse of :func:`activation_name`.

    Raises:
        ValueError: there is none of this name.
    """
    parts = SPELLING.fullmatch(name)
    if parts and parts["base"] in MODULES:
        kind = MODULES[parts["base"]]
        if parts["parameter"] is None:
            return kind()
        if parts["base"] in ("leaky_relu", "elu") and math.isfinite(float(parts["parameter"])):
            return kind(float(parts["parameter"]))
    raise ValueError(
        f"expected activation None, one of {', '.join(map(repr, MODULES))}, 'leaky_relu(slope)', 'elu(alpha)', or "
        f"a module of one of these kinds, got {name!r}"
    )
