"""A chain of links, and the one place in Python that packs it into the operators' arguments and
unpacks it; csrc has the same in C++. Anything may stand for tensors, as nodes of a graph do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from .activations import ACTIVATIONS

# The numbers of the packed form.
_CONV, _NORM, _GATE, _PARTS, _PRELU = range(5)
_ACTIVATIONS = tuple(ACTIVATIONS)
_ARITHMETICS = ("batchnorm", "tutorial", "none", "running")
# Indices among the arguments of conv_bn_chain.
BUFFERS, BUFFER_COUNTS, TRAINING, SAVED, STATISTICS = 1, 4, 6, 8, 9


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

    @property
    def options(self) -> tuple[Any, ...]:
        """The options, in the order of ``torch.convolution``."""
        lists = (self.stride, self.padding, self.dilation)
        return (*lists, self.transposed, self.output_padding, self.groups)

    def result_shape(self, input: Sequence[int], weight: Sequence[int]) -> list[int]:
        """The shape of T', from those of T and of the weight."""
        shape = [input[0], weight[1] * self.groups if self.transposed else weight[0]]
        for d, stride in enumerate(self.stride):
            size, padding = input[d + 2], 2 * self.padding[d]
            reach = (weight[d + 2] - 1) * self.dilation[d] + 1
            if self.transposed:
                shape.append((size - 1) * stride - padding + reach + self.output_padding[d])
            else:
                shape.append((size + padding - reach) // stride + 1)
        return shape


@dataclass
class Norm:
    """T' = act((T − μ)·r·weight + bias [+ residual]). The arithmetic "running" takes mean and
    variance from `statistics`, of shape (2, C); the arithmetic "none" computes act(T [+ residual]);
    the other two take the batch statistics of T.

    `buffers`, `momentum`, `training` and `group` are read by `conv_bn_chain` alone;
    :func:`fusedconvbn.batch_norm.pack_batch_norm` gives the first three."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    arithmetic: str = "batchnorm"
    activation: str = "none"
    parameter: float | None = None  # of the activation; None: its default
    statistics: Tensor | None = None
    # [running_mean, running_var], [num_batches_tracked], all three, or none
    buffers: Sequence[Tensor] = ()
    momentum: float = 0.1  # nan: the average over all batches
    training: bool = True
    group: str = ""  # name of the group of processes that share statistics


@dataclass
class Gate:
    """T' = T·weight, with the weight of shape (N, C, 1, …)."""

    weight: Tensor


@dataclass
class Prelu:
    """T' = T where T > 0, and T·weight elsewhere, with the weight of shape (C) or (1)."""

    weight: Tensor


Link = Conv | Norm | Gate | Prelu


@dataclass
class Packed:
    """The arguments of the operators. The private operators take `tensors` and `options`."""

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
        """The arguments of ``conv_bn_chain``. `saved` are the indices of the inner maps to save;
        the result of the first link has index 1. `statistics` are those of the first norms in
        training, side by side; the others are computed."""
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
    """Packs a chain. A list as input is a virtual concatenation of its tensors."""
    packed = Packed(list(input) if isinstance(input, (list, tuple)) else [input])
    if len(packed.tensors) > 1:
        packed.links += [_PARTS, len(packed.tensors)]
    for link in chain:
        if isinstance(link, (Gate, Prelu)):
            packed.tensors.append(link.weight)
            packed.links.append(_GATE if isinstance(link, Gate) else _PRELU)
            continue
        given = (link.weight, link.bias, getattr(link, "residual", None))
        packed.tensors += [t for t in given if t is not None]
        if isinstance(link, Conv):
            packed.links += [_CONV, int(link.bias is not None), int(link.transposed), link.groups]
            packed.links += [len(link.stride), *link.stride, *link.padding]
            packed.links += [*link.dilation, *link.output_padding]
            continue
        if link.statistics is not None:
            packed.tensors.append(link.statistics)
        packed.links += [_NORM, *(int(t is not None) for t in given)]
        packed.links += [_ARITHMETICS.index(link.arithmetic), _ACTIVATIONS.index(link.activation)]
        default = ACTIVATIONS[link.activation].default
        packed.scalars += [link.eps, default if link.parameter is None else link.parameter]
        packed.buffers += link.buffers
        packed.buffer_counts.append(len(link.buffers))
        packed.momenta.append(link.momentum)
        packed.training.append(int(link.training))
        packed.process_group = packed.process_group or link.group
    return packed


def unpack(
    tensors: Sequence[Any], links: Sequence[int], scalars: Sequence[float]
) -> tuple[list[Any], list[Link]]:
    """The inverse of :func:`pack`, for a well-formed chain: the inputs and the links, which hold
    the elements of `tensors`."""
    numbers, values, given = iter(links), iter(scalars), iter(tensors)
    parts = 1
    if links[0] == _PARTS:
        _, parts = next(numbers), next(numbers)
    input = list(islice(given, parts))
    chain: list[Link] = []
    for kind in numbers:
        if kind in (_GATE, _PRELU):
            chain.append((Gate if kind == _GATE else Prelu)(next(given)))
        elif kind == _CONV:
            has_bias, transposed, groups, dims = islice(numbers, 4)
            weight, bias = next(given), next(given) if has_bias else None
            stride, padding, dilation, extra = (list(islice(numbers, dims)) for _ in range(4))
            options = stride, padding, dilation, bool(transposed), extra, groups
            chain.append(Conv(weight, bias, *options))
        else:
            weight, bias, residual = (
                next(given) if present else None for present in islice(numbers, 3)
            )
            arithmetic, activation = _ARITHMETICS[next(numbers)], _ACTIVATIONS[next(numbers)]
            statistics = next(given) if arithmetic == "running" else None
            eps, parameter = islice(values, 2)
            chain.append(
                Norm(weight, bias, residual, eps, arithmetic, activation, parameter, statistics)
            )
    return input, chain
