"""Floating point operations of the chain operators, for `torch.utils.flop_counter`, which knows PyTorch's alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._imports import when_imported
from .chain import Conv, Norm, Prelu, unpack

RECOMPUTED = "fusedconvbn.recomputed"  # the counter's row for what backward does beyond eager's


class _Chain:
    """A packed chain, the shapes of its maps, and what each link takes. What has a place in `tensors` has that here."""

    def __init__(
        self, tensors: Sequence[Tensor], links: Sequence[int], scalars: Sequence[float]
    ) -> None:
        places, self.links = unpack(range(len(tensors)), links, scalars)
        self.whole = len(places) == 1
        shapes = [tensors[place].shape for place in places]
        self.maps = [[shapes[0][0], sum(s[1] for s in shapes), *shapes[0][2:]]]
        self.weights = [
            list(tensors[link.weight].shape) if isinstance(link, Conv) else []
            for link in self.links
        ]
        for link, weight in zip(self.links, self.weights, strict=True):
            t = self.maps[-1]
            self.maps.append(_result(link, t, weight) if isinstance(link, Conv) else t)

    def forward(self, i: int) -> int:
        """Of link i."""
        from torch.utils.flop_counter import conv_flop_count

        link = self.links[i]
        if not isinstance(link, Conv):
            return 0
        return conv_flop_count(self.maps[i], self.weights[i], self.maps[i + 1], link.transposed)

    def gradients(self, i: int, input: bool, weight: bool) -> int:
        """Of the convolution's gradients that are asked for."""
        from torch.utils.flop_counter import conv_backward_flop

        link, x, w = self.links[i], self.maps[i], self.weights[i]
        options = (None, link.stride, link.padding, link.dilation, link.transposed)
        options += (link.output_padding, link.groups, [input, weight, False])
        return conv_backward_flop(self.maps[i + 1], x, w, *options, out_val=(x, w, None))

    def batch_statistics(self, i: int) -> bool:
        return (
            i < len(self.links)
            and isinstance(self.links[i], Norm)
            and self.links[i].arithmetic in ("batchnorm", "tutorial")
        )


def _result(conv: Conv, t: Sequence[int], weight: Sequence[int]) -> list[int]:
    """The shape of a convolution's result."""
    shape = [t[0], weight[1] * conv.groups if conv.transposed else weight[0]]
    for d, stride in enumerate(conv.stride):
        size, padding = t[d + 2], 2 * conv.padding[d]
        reach = (weight[d + 2] - 1) * conv.dilation[d] + 1
        if conv.transposed:
            shape.append((size - 1) * stride - padding + reach + conv.output_padding[d])
        else:
            shape.append((size + padding - reach) // stride + 1)
    return shape


def forward_flops(
    tensors: Sequence[Tensor], links: Sequence[int], scalars: Sequence[float], *_: Any, **__: Any
) -> int:
    chain = _Chain(tensors, links, scalars)
    return sum(chain.forward(i) for i in range(len(chain.links)))


def backward_flops(
    dout: Tensor,
    tensors: Sequence[Tensor],
    kept_maps: Sequence[Tensor],
    statistics: Sequence[Tensor],
    links: Sequence[int],
    scalars: Sequence[float],
    process_group: str,
    kept: Sequence[int],
    wanted: Sequence[int],
) -> tuple[int, int]:
    """Of the gradients, as eager counts them, and of all else that backward does: `Execution::backward` in
    csrc/execution.cpp without the tensors."""
    chain = _Chain(tensors, links, scalars)
    count = len(chain.links)
    at_hand = {*kept, *([0] if chain.whole else [])}

    def result(i: int) -> bool:
        """Whether the slope of norm link i shows in its result, which is kept."""
        return i + 1 == count and count in at_hand and chain.links[i].activation == "relu"

    reached, read = [0 in wanted], []
    for i, link in enumerate(chain.links):
        given: list[int | None] = [link.weight, getattr(link, "residual", None)]
        if isinstance(link, Norm) or (isinstance(link, Conv) and not chain.batch_statistics(i + 1)):
            given.append(link.bias)  # one that cancels is not reached
        reached.append(reached[i] or any(place in wanted for place in given))
        reads = isinstance(link, (Conv, Prelu)) or link.weight in wanted
        if isinstance(link, Norm):
            slope_at_hand = link.activation == "none" or result(i)
            others = reached[i] or link.weight in wanted or link.bias in wanted
            reads = not slope_at_hand or (link.arithmetic != "none" and others)
        read.append(reached[i + 1] and reads)

    gradients = recomputed = 0

    def recompute(i: int) -> None:
        nonlocal recomputed
        first = max((m for m in at_hand if m < i), default=0)
        recomputed += sum(chain.forward(m) for m in range(first, i))
        conv = [m for m in range(first + 1, i - 1) if isinstance(chain.links[m - 1], Conv)]
        at_hand.update(m for m in (*conv, i - 1) if m > first and read[m])
        at_hand.add(i)
        if first > 0 and first not in kept and not read[first]:
            at_hand.discard(first)

    i = count - 1
    while i >= 0 and reached[i + 1]:
        if read[i] and i not in at_hand:
            recompute(i)
        if isinstance(chain.links[i], Conv):
            gradients += chain.gradients(i, reached[i], chain.links[i].weight in wanted)
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
    if mode is not None:  # else both are in one row
        torch.library.register_torch_dispatch("fusedconvbn::_chain_backward", mode, _count_apart)


def _count_apart(mode: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """A `FlopCounterMode` counts by operator; this makes two rows of one."""
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
