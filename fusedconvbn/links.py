"""A chain of a model's own modules: read at every call, run as one operator."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from .batch_norm import batch_norm_attributes, batch_norm_link
from .chain import ACTIVATIONS, PARAMETERS, parse_activation
from .synchronised import Synchronised

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ConvOptions(NamedTuple):
    """A convolution's options as the operators take them, and what padding is left for F.pad in front of it: a mode other
    than zeros, and the odd value of "same", which stands at the end."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    output_padding: list[int]
    pad: list[int]
    pad_mode: str

    @classmethod
    def of(cls, conv: nn.Module) -> "ConvOptions":
        if conv.padding == "same":
            total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        elif conv.padding == "valid":
            total = [0] * len(conv.stride)
        else:
            total = [2 * p for p in conv.padding]
        padding = [t // 2 for t in total]
        ends = [(0, t % 2) for t in total]
        mode = "constant"
        if conv.padding_mode != "zeros":
            mode = conv.padding_mode
            ends = [(t // 2, t - t // 2) for t in total]
            padding = [0] * len(total)
        pad = [value for end in reversed(ends) for value in end]
        return cls(
            list(conv.stride),
            padding,
            list(conv.dilation),
            list(conv.output_padding),
            pad if any(pad) else [],
            mode,
        )


def refuse_lazy(where: str, name: str, module: Any) -> None:
    """A lazy module has no parameters, and what it becomes is not known, before its first call."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise TypeError(
            f"{where}: expected {name} with parameters, got a lazy {type(module).__name__}: call it, or its model, once"
        )


def submodule(owner: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        owner = owner._modules[name]
    return owner


@dataclass(frozen=True)
class ConvLink:
    """A convolution of the owner, by its path, with the options it had when it was found."""

    path: tuple[str, ...]
    transposed: bool
    groups: int
    options: ConvOptions

    @classmethod
    def of(cls, path: tuple[str, ...], conv: nn.Module) -> "ConvLink":
        return cls(path, bool(conv.transposed), conv.groups, ConvOptions.of(conv))

    def packed(self, has_bias: bool) -> list[int]:
        """As csrc/chain.h has it."""
        options = self.options
        packed = [0, int(has_bias), int(self.transposed), self.groups, len(options.stride)]
        packed += [*options.stride, *options.padding]
        return [*packed, *options.dilation, *options.output_padding]


@dataclass(frozen=True)
class NormLink:
    """A batch norm of the owner, and the activation behind it."""

    path: tuple[str, ...]
    activation: str = "none"

    def packed(self, has_weight: bool, has_bias: bool, has_residual: bool) -> list[int]:
        """As csrc/chain.h has it."""
        kind = ACTIVATIONS.index(parse_activation(self.activation)[0])
        return [1, int(has_weight), int(has_bias), int(has_residual), 0, kind]

    @property
    def parameter(self) -> float:
        """The activation's."""
        base, parameter = parse_activation(self.activation)
        return PARAMETERS.get(base, 0.0) if parameter is None else parameter


@dataclass
class Call:
    """The arguments of ``torch.ops.fusedconvbn.conv_bn_chain`` but for the first gate and the input."""

    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    links: list[int] = field(default_factory=list)
    scalars: list[float] = field(default_factory=list)
    buffer_counts: list[int] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)
    training: list[int] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)  # of the process, of each link in training

    def add_conv(self, link: ConvLink, conv: nn.Module) -> None:
        self.tensors.append(conv.weight)
        if conv.bias is not None:
            self.tensors.append(conv.bias)
        self.links += link.packed(conv.bias is not None)

    def add_norm(self, link: NormLink, bn: nn.Module, residual: Tensor | None) -> None:
        given = [t for t in (bn.weight, bn.bias, residual) if t is not None]
        self.tensors += given
        self.links += link.packed(bn.weight is not None, bn.bias is not None, residual is not None)
        self.scalars += [bn.eps, link.parameter]

        buffers, count, momentum, training = batch_norm_link(*batch_norm_attributes(bn))
        self.buffers += buffers
        self.buffer_counts.append(count)
        self.momenta.append(momentum)
        self.training.append(training)
        if training:
            synchronised = isinstance(bn, nn.SyncBatchNorm) and bn.training
            name = Synchronised(True, bn.process_group).group_name() if synchronised else ""
            self.groups.append(name)


@dataclass
class Chain:
    """Links that alternate between convolutions and batch norms of one module, the owner.

    Attributes:
        links: in the order in which they run.
        kept: the inner maps that are kept for backward: i stands for the result of link i, counted from 1, a gate
            in front being link 1.
        modules: the paths of all modules that it stands for, activations too.
        joined: whether a residual is added to its result.
    """

    links: tuple[ConvLink | NormLink, ...]
    gated: bool = False
    kept: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    joined: bool = False

    @property
    def name(self) -> str:
        return " → ".join(".".join(link.path) for link in self.links)

    def maps(self) -> list[tuple[str, ...]]:
        """The inner maps, by the path of the module whose result they are; the place of the first one is 1 + gated."""
        return [link.path for link in self.links[:-1]]

    def plan(self, kept: Any) -> None:
        """Keeps those of the maps whose path is in `kept`, joined by dots."""
        first = 1 + self.gated
        self.kept = tuple(first + i for i, path in enumerate(self.maps()) if ".".join(path) in kept)

    def __call__(
        self,
        owner: nn.Module,
        input: Tensor | Sequence[Tensor],
        residual: Tensor | None = None,
        gate: Tensor | None = None,
        statistics: dict[Any, Tensor] | None = None,
        keys: tuple[str, ...] = (),
    ) -> Tensor:
        """Runs the chain.

        Args:
            owner: the module that the paths of the links start from.
            input: a map, or several whose channels are concatenated.
            residual: added to the result of the last link, before its activation.
            gate: what the input is multiplied by.
            statistics: batch statistics that other chains have computed of the inputs, and this one will add to.
            keys: under which they stand there.
        """
        modules = [submodule(owner, link.path) for link in self.links]
        parts = list(input) if isinstance(input, (list, tuple)) else [input]
        if gate is not None and not (isinstance(gate, Tensor) and isinstance(parts[0], Tensor)):
            parts, gate = [parts[0] * gate], None  # by a number
        if residual is not None and not isinstance(residual, Tensor):
            residual = torch.as_tensor(residual, dtype=parts[0].dtype, device=parts[0].device)
        call = Call()
        if len(parts) > 1:
            call.links += [3, len(parts)]
        first = self.links[0]
        if isinstance(first, ConvLink) and first.options.pad:
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            if gate is not None:
                whole, gate = whole * gate, None
            parts = [F.pad(whole, first.options.pad, first.options.pad_mode)]
            call.links.clear()
        if gate is not None:
            call.tensors.append(gate)
            call.links.append(2)
        for i, (link, module) in enumerate(zip(self.links, modules, strict=True)):
            if isinstance(link, ConvLink):
                call.add_conv(link, module)
            else:
                call.add_norm(link, module, residual if i + 1 == len(modules) else None)
        if any(name != call.groups[0] for name in call.groups):
            return self._one_by_one(modules, parts, residual, gate)
        group = call.groups[0] if call.groups else ""
        known = None
        if statistics is not None and isinstance(first, NormLink) and call.training[0]:
            known = _statistics(parts, keys, statistics, group)
        shift = int(self.gated) - int(gate is not None)  # a gate that was multiplied is no link
        return torch.ops.fusedconvbn.conv_bn_chain(
            parts + call.tensors,
            call.buffers,
            call.links,
            call.scalars,
            call.buffer_counts,
            call.momenta,
            call.training,
            group,
            [k - shift for k in self.kept],
            known,
        )

    def _one_by_one(
        self,
        modules: list[nn.Module],
        parts: list[Tensor],
        residual: Tensor | None,
        gate: Tensor | None,
    ) -> Tensor:
        """For batch norms that are synchronised in different groups: one operator, one group."""
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        out = out if gate is None else out * gate
        for link, module in zip(self.links, modules, strict=True):
            if isinstance(link, ConvLink):
                out = module(out)
                continue
            owner = nn.Module()
            owner._modules["bn"] = module
            last = link is self.links[-1]
            alone = Chain((NormLink(("bn",), link.activation),))
            out = alone(owner, out, residual if last else None)
        return out


def _statistics(
    parts: list[Tensor], keys: tuple[str, ...], statistics: dict[Any, Tensor], group: str
) -> Tensor:
    for part, key in zip(parts, keys, strict=True):
        if (key, group) not in statistics:
            found = torch.ops.fusedconvbn._channel_stats(part.detach(), group)
            statistics[key, group] = found
    return torch.cat([statistics[key, group] for key in keys], 1)
