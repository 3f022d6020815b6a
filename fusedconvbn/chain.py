"""A chain of conv and norm links in the packed form of the private operators (csrc/chain.h). Not public."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

ACTIVATIONS = ("none", "relu")
ARITHMETICS = ("batchnorm", "tutorial")


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
    """T' = act((T − μ)·r·weight + bias) with the batch statistics of T."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    arithmetic: str = "batchnorm"
    activation: str = "none"


@dataclass
class Packed:
    """The arguments that both private operators take."""

    tensors: list[Tensor]
    links: list[int] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)


def pack(input: Tensor, chain: Sequence[Conv | Norm]) -> Packed:
    packed = Packed([input])
    for link in chain:
        packed.tensors += [t for t in (link.weight, link.bias) if t is not None]
        if isinstance(link, Conv):
            packed.links += [0, link.bias is not None, link.transposed, link.groups]
            packed.links += [len(link.stride), *link.stride, *link.padding]
            packed.links += [*link.dilation, *link.output_padding]
        else:
            packed.links += [1, link.weight is not None, link.bias is not None]
            packed.links += [ARITHMETICS.index(link.arithmetic), ACTIVATIONS.index(link.activation)]
            packed.eps.append(link.eps)
    return packed
