"""A chain of links and its packed form (csrc/chain.h). What stands for tensors may be anything, as nodes of a graph."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from .activations import MODULES, SPELLING

ACTIVATIONS = tuple(MODULES)  # in the order of csrc/activation.h
PARAMETERS = {"leaky_relu": 0.01, "elu": 1.0}
ARITHMETICS = ("batchnorm", "tutorial", "none", "running")


def parse_activation(name: str) -> tuple[str, float | None]:
    """ "leaky_relu(0.2)" → "leaky_relu", 0.2"""
    parts = SPELLING.fullmatch(name)
    assert parts is not None, name
    return parts["base"], None if parts["parameter"] is None else float(parts["parameter"])


@dataclass
class Conv:
    """T' = conv(T, weight) + bias, with one value for each spatial dimension in every list."""

    weight: Tensor
    bias: Tensor | None = None
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    transposed: bool = False
    output_padding: Sequence[int] = (0, 0)
    groups: int = 1


@dataclass
class Norm:
    """T' = act((T − μ)·r·weight + bias [+ residual]) with the batch statistics of T, or, of the arithmetic "running", with
    `statistics`, the (2, C) mean and variance; act(T [+ residual]) with the arithmetic "none".

    The last four are what `conv_bn_chain` reads besides, as :func:`fusedconvbn.batch_norm.batch_norm_link` gives them."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    arithmetic: str = "batchnorm"
    activation: str = "none"
    parameter: float | None = None  # the activation's; its usual one when None
    statistics: Tensor | None = None
    buffers: Sequence[
        Tensor
    ] = ()  # running_mean and running_var, num_batches_tracked; both or either
    momentum: float = 0.1  # nan for the average over all batches
    training: bool = True
    group: str = ""  # of the processes that share statistics


@dataclass
class Gate:
    """T' = T·weight, where weight is (N, C, 1, …)."""

    weight: Tensor


@dataclass
class Prelu:
    """T' = T where T > 0, T·weight elsewhere, where weight is (C) or (1)."""

    weight: Tensor


Link = Conv | Norm | Gate | Prelu


@dataclass
class Packed:
    """The arguments of the operators. The private ones take `tensors` and `options`."""

    tensors: list[Any]
    links: list[int] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    process_group: str = ""
    buffers: list[Any] = field(default_factory=list)
    buffer_counts: list[int] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)
    training: list[int] = field(default_factory=list)

    @property
    def options(self) -> tuple[list[int], list[float], str]:
        return self.links, self.scalars, self.process_group

    def call(self, saved: Sequence[int], statistics: Any = None) -> tuple[Any, ...]:
        """The arguments of ``conv_bn_chain``: `saved` are the inner maps to save, 1 being the first link's result."""
        norms = (self.buffer_counts, self.momenta, self.training)
        return (
            self.tensors,
            self.buffers,
            self.links,
            self.scalars,
            *norms,
            self.process_group,
            list(saved),
            statistics,
        )


def pack(input: Any, chain: Sequence[Link]) -> Packed:
    """Packs a chain. A list as input is the virtual concatenation of its tensors."""
    packed = Packed(list(input) if isinstance(input, (list, tuple)) else [input])
    if len(packed.tensors) > 1:
        packed.links += [3, len(packed.tensors)]
    for link in chain:
        if isinstance(link, (Gate, Prelu)):
            packed.tensors.append(link.weight)
            packed.links.append(2 if isinstance(link, Gate) else 4)
            continue
        given = (link.weight, link.bias, getattr(link, "residual", None))
        packed.tensors += [t for t in given if t is not None]
        if isinstance(link, Conv):
            packed.links += [0, int(link.bias is not None), int(link.transposed), link.groups]
            packed.links += [len(link.stride), *link.stride, *link.padding]
            packed.links += [*link.dilation, *link.output_padding]
            continue
        if link.statistics is not None:
            packed.tensors.append(link.statistics)
        packed.links += [1, *(int(t is not None) for t in given)]
        packed.links += [ARITHMETICS.index(link.arithmetic), ACTIVATIONS.index(link.activation)]
        parameter = PARAMETERS.get(link.activation, 0.0)
        packed.scalars += [link.eps, parameter if link.parameter is None else link.parameter]
        packed.buffers += link.buffers
        packed.buffer_counts.append(len(link.buffers))
        packed.momenta.append(link.momentum)
        packed.training.append(int(link.training))
        packed.process_group = packed.process_group or link.group
    return packed


def unpack(
    tensors: Sequence[Any], links: Sequence[int], scalars: Sequence[float]
) -> tuple[list[Any], list[Link]]:
    """The way back, for a chain that is well formed: the inputs and the links, with what `tensors` has for their tensors."""
    numbers, values, given = iter(links), iter(scalars), iter(tensors)
    parts = 1
    if links[0] == 3:
        _, parts = next(numbers), next(numbers)
    input = list(islice(given, parts))
    chain: list[Link] = []
    for kind in numbers:
        if kind in (2, 4):
            chain.append((Gate if kind == 2 else Prelu)(next(given)))
        elif kind == 0:
            has_bias, transposed, groups, dims = islice(numbers, 4)
            weight, bias = next(given), next(given) if has_bias else None
            lists = [list(islice(numbers, dims)) for _ in range(4)]
            chain.append(Conv(weight, bias, *lists[:3], bool(transposed), lists[3], groups))
        else:
            weight, bias, residual = (
                next(given) if there else None for there in islice(numbers, 3)
            )
            arithmetic, activation = ARITHMETICS[next(numbers)], ACTIVATIONS[next(numbers)]
            statistics = next(given) if arithmetic == "running" else None
            eps, parameter = islice(values, 2)
            chain.append(
                Norm(weight, bias, residual, eps, arithmetic, activation, parameter, statistics)
            )
    return input, chain
