"""Floating point operations of the chain operators, for `torch.utils.flop_counter`, which knows
only PyTorch's own operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._imports import when_imported
from .chain import Conv, Norm, Prelu, unpack

RECOMPUTED = "fusedconvbn.recomputed"  # the counter's row for what backward recomputes


class _Chain:
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
            self.maps.append(_result(link, t, weight) if isinstance(link, Conv) else t)

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

    def has_batch_statistics(self, i: int) -> bool:
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
    saved_maps: Sequence[Tensor],
    statistics: Sequence[Tensor],
    links: Sequence[int],
    scalars: Sequence[float],
    process_group: str,
    saved: Sequence[int],
    needs_grad: Sequence[int],
) -> tuple[int, int]:
    """FLOPs of the gradients, as eager counts them, and of the recomputation: the decisions of the
    C++ backward of a chain, without its tensors."""
    chain = _Chain(tensors, links, scalars)
    map_needs_grad, is_read = _backward_reads(chain, saved, needs_grad)
    available = {*saved, *([0] if chain.whole else [])}
    gradients = recomputed = 0

    def recompute(i: int) -> None:
        nonlocal recomputed
        first = max((m for m in available if m < i), default=0)
        recomputed += sum(chain.forward(m) for m in range(first, i))
        conv = [m for m in range(first + 1, i - 1) if isinstance(chain.links[m - 1], Conv)]
        available.update(m for m in (*conv, i - 1) if m > first and is_read[m])
        available.add(i)
        if first > 0 and first not in saved and not is_read[first]:
            available.discard(first)

    i = len(chain.links) - 1
    while i >= 0 and map_needs_grad[i + 1]:
        if is_read[i] and i not in available:
            recompute(i)
        if isinstance(chain.links[i], Conv):
            gradients += chain.gradients(i, map_needs_grad[i], chain.links[i].weight in needs_grad)
        i -= 1
    return gradients, recomputed


def _backward_reads(
    chain: _Chain, saved: Sequence[int], needs_grad: Sequence[int]
) -> tuple[list[bool], list[bool]]:
    """Of each map, whether its gradient is needed; of each link, whether its backward reads its
    input."""
    count = len(chain.links)
    map_needs_grad, is_read = [0 in needs_grad], []
    for i, link in enumerate(chain.links):
        given: list[int | None] = [link.weight, getattr(link, "residual", None)]
        # The gradient of a convolution's bias in front of batch statistics is 0.
        cancels = isinstance(link, Conv) and chain.has_batch_statistics(i + 1)
        if isinstance(link, (Conv, Norm)) and not cancels:
            given.append(link.bias)
        map_needs_grad.append(map_needs_grad[i] or any(t in needs_grad for t in given))
        reads = isinstance(link, (Conv, Prelu)) or link.weight in needs_grad
        if isinstance(link, Norm):
            # ReLU's slope is read from the result of the last link, where that is saved.
            from_result = i + 1 == count and count in saved and link.activation == "relu"
            others = map_needs_grad[i] or link.weight in needs_grad or link.bias in needs_grad
            reads = not (link.activation == "none" or from_result) or (
                link.arithmetic != "none" and others
            )
        is_read.append(map_needs_grad[i + 1] and reads)
    return map_needs_grad, is_read


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
