"""What the backward of a chain reads and recomputes: the decisions of csrc/chain/backward.cpp,
without its tensors."""

from collections.abc import Collection, Sequence
from typing import Any

from .chain import Conv, Link, Norm, Prelu


def has_batch_statistics(links: Sequence[Link], i: int) -> bool:
    return (
        i < len(links)
        and isinstance(links[i], Norm)
        and links[i].arithmetic in ("batchnorm", "tutorial")
    )


def bias_cancels(links: Sequence[Link], i: int) -> bool:
    """Whether link i is a convolution in front of batch statistics: the gradient of its bias is
    0."""
    return isinstance(links[i], Conv) and has_batch_statistics(links, i + 1)


def only_residual(
    links: Sequence[Link], i: int, saved: Collection[int], needs: Collection[int], below: bool
) -> bool:
    """Whether the residual of norm link i is all that needs a gradient, and the gradient can be
    computed without the link's input. `below`: the input needs a gradient."""
    link: Any = links[i]
    others = below or link.weight in needs or link.bias in needs
    return not others and (link.activation == "none" or has_result(links, i, saved))


def has_result(links: Sequence[Link], i: int, saved: Collection[int]) -> bool:
    """Whether the slope of norm link i is read from its result, which is saved."""
    last = i + 1 == len(links)
    return last and len(links) in saved and links[i].activation == "relu"


def backward_reads(
    links: Sequence[Link], saved: Collection[int], needs: Collection[int]
) -> tuple[list[bool], list[bool]]:
    """Of each map, whether its gradient is needed; of each link, whether its backward reads its
    input. The links hold the indices of their tensors; `needs` are those that need a gradient."""
    map_needs_grad, is_read = [0 in needs], []
    for i, link in enumerate(links):
        given: list[int | None] = [link.weight, getattr(link, "residual", None)]
        if isinstance(link, (Conv, Norm)) and not bias_cancels(links, i):
            given.append(link.bias)
        below = map_needs_grad[i]
        map_needs_grad.append(below or any(t in needs for t in given))
        reads = isinstance(link, (Conv, Prelu)) or link.weight in needs
        if isinstance(link, Norm):
            needs_u = link.activation != "none" and not has_result(links, i, saved)
            reads = needs_u or (
                link.arithmetic != "none" and not only_residual(links, i, saved, needs, below)
            )
        is_read.append(map_needs_grad[i + 1] and reads)
    return map_needs_grad, is_read


def recomputation(
    links: Sequence[Link],
    i: int,
    available: Collection[int],
    saved: Collection[int],
    is_read: Sequence[bool],
) -> tuple[int, set[int]]:
    """The map from which map i is recomputed, and the maps before it that are retained: those that
    backward reads next, and the results of convolutions."""
    first = max((m for m in available if m < i), default=0)
    kept = {
        m
        for m in range(first + 1, i)
        if is_read[m] and (m == i - 1 or isinstance(links[m - 1], Conv))
    }
    if first in saved or (first > 0 and is_read[first]):
        kept.add(first)
    return first, kept
