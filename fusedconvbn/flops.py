"""Floating point operations of the chain operators, for `torch.utils.flop_counter`, which knows
only PyTorch's own operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._imports import when_imported
from .chain import Conv, unpack
from .recomputation import backward_reads, recomputation

RECOMPUTED = "fusedconvbn.recomputed"  # the counter's row for what backward recomputes


class Chain:
    """A packed chain, the shapes of its maps, and the FLOPs of each link. The links hold the
    indices of their tensors in `tensors`."""

    def __init__(
        self, tensors: Sequence[Tensor], links: Sequence[int], scalars: Sequence[float]
    ) -> None:
        parts, self.links = unpack(range(len(tensors)), links, scalars)
        self.whole = len(parts) == 1
        shapes = [tensors[part].shape for part in parts]
        self.maps = [[shapes[0][0], sum(s[1] for s in shapes), *shapes[0][2:]]]
        self.weights = [
            list(tensors[link.weight].shape) if isinstance(link, Conv) else []
            for link in self.links
        ]
        for link, weight in zip(self.links, self.weights, strict=True):
            t = self.maps[-1]
            self.maps.append(link.result_shape(t, weight) if isinstance(link, Conv) else t)

    def forward(self, i: int) -> int:
        """FLOPs of the forward of link i."""
        from torch.utils.flop_counter import conv_flop_count

        link = self.links[i]
        if not isinstance(link, Conv):
            return 0
        return conv_flop_count(self.maps[i], self.weights[i], self.maps[i + 1], link.transposed)

    def gradients(self, i: int, input: bool, weight: bool) -> int:
        """FLOPs of the gradients of convolution i, as far as they are needed."""
        from torch.utils.flop_counter import conv_backward_flop

        link, x, w = self.links[i], self.maps[i], self.weights[i]
        mask = [input, weight, False]
        return conv_backward_flop(
            self.maps[i + 1], x, w, None, *link.options, mask, out_val=(x, w, None)
        )


def forward_flops(
    tensors: Sequence[Tensor], links: Sequence[int], scalars: Sequence[float], *_: Any, **__: Any
) -> int:
    chain = Chain(tensors, links, scalars)
    return sum(chain.forward(i) for i in range(len(chain.links)))


def backward_flops(
    dout: Tensor,
    tensors: Sequence[Tensor],
    saved_maps: Sequence[Tensor],
    statistics: Sequence[Tensor],
    links: Sequence[int],
    scalars: Sequence[float],
    process_group: str,
    saved: Sequence[int],
    needs_grad: Sequence[int],
) -> tuple[int, int]:
    """FLOPs of the gradients, as eager counts them, and of the recomputation."""
    chain = Chain(tensors, links, scalars)
    gradients, recomputed = backward_links(chain, saved, needs_grad)
    of_gradients = sum(
        chain.gradients(i, input, chain.links[i].weight in needs_grad)
        for i, input in gradients
        if isinstance(chain.links[i], Conv)
    )
    return of_gradients, sum(chain.forward(i) for i in recomputed)


def backward_links(
    chain: Chain, saved: Sequence[int], needs_grad: Sequence[int]
) -> tuple[list[tuple[int, bool]], list[int]]:
    """The links whose gradients backward computes, each with whether that of its input is needed,
    and the links that it runs again: the decisions of the C++ backward of a chain, without its
    tensors."""
    map_needs_grad, is_read = backward_reads(chain.links, saved, needs_grad)
    kept_at_first = {*saved, *([0] if chain.whole else [])}
    available = set(kept_at_first)
    gradients: list[tuple[int, bool]] = []
    recomputed: list[int] = []
    i = len(chain.links) - 1
    while i >= 0 and map_needs_grad[i + 1]:
        if is_read[i] and i not in available:
            first, kept = recomputation(chain.links, i, available, kept_at_first, is_read)
            recomputed += range(first, i)
            available.difference_update({first} - kept)
            available.update(kept, [i])
        gradients.append((i, map_needs_grad[i]))
        i -= 1
    return gradients, recomputed


def _register() -> None:
    from torch.utils import flop_counter

    operators = torch.ops.fusedconvbn
    if operators._chain_forward in flop_counter.flop_registry:
        return
    register = flop_counter.register_flop_formula

    @register(operators._chain_forward, get_raw=True)
    def forward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return forward_flops(*args, **kwargs)

    @register(operators._chain_backward, get_raw=True)
    def backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return sum(backward_flops(*args, **kwargs))

    mode = getattr(flop_counter, "_FlopCounterMode", None)
    if mode is not None:  # otherwise one row has both
        torch.library.register_torch_dispatch("fusedconvbn::_chain_backward", mode, _count_apart)


def _count_apart(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Splits the count of an operator, for which a `FlopCounterMode` has one row, into two rows."""
    out = func(*args, **kwargs)
    gradients, recomputed = backward_flops(*args, **kwargs)
    counter = mode.counter
    for module in set(counter.mod_tracker.parents):
        counts = counter.flop_counts[module]
        counts[func.overloadpacket] += gradients
        if recomputed:
            counts[RECOMPUTED] += recomputed
    return out


def register() -> None:
    when_imported("torch.utils.flop_counter", _register)
