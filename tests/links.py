"""Chains of links for the tests, and the same chains in elementary layers."""

from itertools import chain as concatenate
from itertools import combinations

import torch
import torch.nn.functional as F

from fusedconvbn.chain import Conv, Gate, Norm, Prelu


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def links(pattern, channels=3):
    """`pattern` has a letter for each link: c, d (depthwise), t (transposed), p (wide and 1×1), n,
    f (frozen norm), g (gate), r (prelu) or s (with one slope)."""
    made = []
    for letter in pattern:
        if letter == "g":
            made.append(Gate(draw(2, channels, 1, 1)))
        elif letter in "rs":
            made.append(Prelu(draw(channels if letter == "r" else 1)))
        elif letter == "f":
            statistics = torch.stack([torch.randn(channels), torch.rand(channels) + 0.3]).double()
            made.append(
                Norm(
                    draw(channels),
                    draw(channels),
                    arithmetic="running",
                    activation="silu" if len(made) % 2 else "none",
                    statistics=statistics,
                )
            )
        elif letter == "n":
            activation = "relu" if len(made) % 2 else "none"
            made.append(Norm(draw(channels), draw(channels), activation=activation))
        elif letter == "d":
            made.append(Conv(draw(channels, 1, 3, 2), None, padding=(1, 1), groups=channels))
        elif letter == "t":
            made.append(Conv(draw(channels, 2, 2, 1), draw(2), transposed=True, stride=(2, 1)))
            channels = 2
        elif letter == "p":
            made.append(Conv(draw(4 * channels, channels, 1, 1)))
            channels *= 4
        else:
            made.append(
                Conv(draw(channels + 1, channels, 2, 1), draw(channels + 1), padding=(1, 0))
            )
            channels += 1
    return made


def unfused(input, chain):
    """`input` may be a list, which is concatenated."""
    input = input if isinstance(input, torch.Tensor) else torch.cat(input, 1)
    for link in chain:
        if isinstance(link, Gate):
            input = input * link.weight
        elif isinstance(link, Prelu):
            input = F.prelu(input, link.weight)
        elif isinstance(link, Norm):
            running = (None, None) if link.statistics is None else link.statistics
            training = link.statistics is None
            input = F.batch_norm(
                input, *running, link.weight, link.bias, training=training, eps=link.eps
            )
            input = {"relu": F.relu, "silu": F.silu, "none": lambda t: t}[link.activation](input)
        else:
            options = [list(v) for v in (link.stride, link.padding, link.dilation)]
            input = torch.convolution(
                input,
                link.weight,
                link.bias,
                *options,
                link.transposed,
                list(link.output_padding),
                link.groups,
            )
    return input


def plans(n):
    inner = range(1, n)
    return concatenate.from_iterable(combinations(inner, k) for k in range(n))


PATTERNS = (
    "cn",
    "nc",
    "nn",
    "cnn",
    "cnc",
    "ncn",
    "cnd",
    "cncn",
    "ncnc",
    "ccnn",
    "dncnt",
    "cndncn",
    "ncntnc",
    "gcn",
    "cngdn",
    "cng",
    "fcn",
    "ncfg",
    "cfgdn",
    "npnc",
    "cnr",
    "ncsc",
    "cnrcns",
    "nrgcn",
    "rcfs",
)


def differentiable(packed, chain):
    """The tensors of `packed` that have gradients: all but running statistics."""
    frozen = [id(getattr(link, "statistics", None)) for link in chain]
    return [t for t in packed.tensors if id(t) not in frozen]
