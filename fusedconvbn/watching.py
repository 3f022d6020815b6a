"""Convolutions and batch norms of a forward that cannot be traced, paired by watching one run of it.

The convolution of a pair puts off its work: its result is a stand-in that knows what it would be. The batch norm that is
given the stand-in runs both; whatever else reads it gets the convolution's result. So it does not matter which way the
forward takes the next time.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .links import Chain, ConvLink, NormLink

_METADATA = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.layout.__get__,
    Tensor.ndim.__get__,
    Tensor.requires_grad.__get__,
    Tensor.is_cuda.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.is_contiguous,
}


class Postponed(Tensor):
    """The result of a convolution that has not run."""

    conv: nn.Module
    input: Tensor
    version: int
    made: Tensor | None

    @staticmethod
    def of(conv: nn.Module, input: Tensor) -> "Postponed":
        with torch.no_grad():
            meta = [t if t is None else t.to("meta") for t in (input, conv.weight, conv.bias)]
            size = conv._conv_forward(*meta).size()
        dtype, device = input.dtype, input.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        stand_in = Tensor._make_wrapper_subclass(
            Postponed, size, dtype=dtype, device=input.device, requires_grad=True
        )
        stand_in.conv, stand_in.input = conv, input
        stand_in.version, stand_in.made = input._version, None
        return stand_in

    def untouched_input(self) -> Tensor:
        if self.input._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"input of {self.conv} was written to before its batch norm ran"
            )
        return self.input

    def result(self) -> Tensor:
        if self.made is None:
            self.made = type(self.conv).forward(self.conv, self.untouched_input())
        return self.made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Postponed, Postponed.result, (tuple(args), kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For what reaches the dispatcher another way, as a C++ function does."""
        return cls.__torch_function__(function, types, args, kwargs)


class PostponingForward:
    """The forward of a convolution whose batch norm runs it."""

    is_fused = True
    chains: tuple[Chain, ...] = ()

    def __init__(self, conv: nn.Module) -> None:
        self.module = conv

    def __call__(self, input: Tensor) -> Tensor:
        conv = self.module
        watched = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        trained = conv.weight.requires_grad or getattr(input, "requires_grad", False)
        if watched and trained and isinstance(input, Tensor) and input.dim() == conv.weight.dim():
            if isinstance(input, Postponed):
                input = input.result()
            return Postponed.of(conv, input)
        return type(conv).forward(conv, input)

    def scriptable(self) -> nn.Module:
        return _plain(self.module)


class PairedForward:
    """The forward of a batch norm that runs the convolution in front of it."""

    is_fused = True

    def __init__(self, bn: nn.Module, conv: nn.Module, chain: Chain) -> None:
        self.module, self.conv, self.chain = bn, conv, chain
        (conv_path,), (bn_path,) = (link.path for link in chain.links)
        self.owner = nn.Module()
        self.owner._modules.update({conv_path: conv, bn_path: bn})

    @property
    def chains(self) -> tuple[Chain, ...]:
        return (self.chain,)

    def __call__(self, input: Tensor) -> Tensor:
        if isinstance(input, Postponed):
            if input.conv is self.conv and input.made is None:
                return self.chain(self.owner, input.untouched_input())
            input = input.result()
        return type(self.module).forward(self.module, input)

    def scriptable(self) -> nn.Module:
        return _plain(self.module)


def _plain(module: nn.Module) -> nn.Module:
    plain = copy.copy(module)
    del plain.__dict__["forward"], plain.__dict__["__prepare_scriptable__"]
    return plain


def pair_up(
    conv_path: str, conv: nn.Module, bn_path: str, bn: nn.Module
) -> tuple[PostponingForward, PairedForward]:
    """The forwards of a convolution and its batch norm."""
    chain = Chain(
        (ConvLink.of((conv_path,), conv), NormLink((bn_path,))), modules=(conv_path, bn_path)
    )
    return PostponingForward(conv), PairedForward(bn, conv, chain)
