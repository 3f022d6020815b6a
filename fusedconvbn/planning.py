"""Which inner maps of a model's chains are kept, and which are remade in backward.

Every inner map is read in backward. One that is not kept is remade once, by the link that made it: that costs the time of
one convolution, or of one pass over the map, and saves its bytes. So the maps are independent of each other, and the best plan
under a budget is the solution of a 0/1 knapsack problem.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .links import CONVOLUTIONS

# What a device does in a second, in round figures; only their ratios count. (calibrate=True measures instead.)
_FLOPS = {"cpu": 200e9, "cuda": 200e12}
_BYTES = {"cpu": 40e9, "cuda": 2e12}
_WINOGRAD = 1.8  # times as fast on CPU, in float (csrc/cpu/winograd.h)
# A kept byte is worth the time that moving so many takes: what makes "auto" give up memory that is nearly free.
_PRICE = 15.0
AUTO_FRACTION = 0.53  # of the bytes that eager saves, which "auto" stays below
_AUTO_FLOPS = 0.12  # of a step's, the most that "auto" adds for memory below that


class OutOfReach(ValueError):
    """A budget below what a model saves with nothing kept."""


@dataclass(frozen=True)
class InnerMap:
    """A map between two links of a chain.

    Attributes:
        path: of the module whose result it is.
        nbytes: its size.
        flops: of remaking it.
        seconds: the time of remaking it.
    """

    path: str
    nbytes: int
    flops: int
    seconds: float


def flops_per_value(module: nn.Module) -> float:
    """Floating point operations for each value of a module's result: 0 for what is not a convolution."""
    if not isinstance(module, CONVOLUTIONS):
        return 0.0
    kernel = 1
    for k in module.kernel_size:
        kernel *= k
    flops = 2.0 * module.in_channels // module.groups * kernel
    if module.transposed:
        for s in module.stride:
            flops /= s
    return flops


def seconds_per_value(module: nn.Module, itemsize: int, device: str) -> float:
    """Of remaking the result of a convolution, or, by one pass, of anything else."""
    read = 1.0
    if isinstance(module, CONVOLUTIONS):
        read = module.in_channels / module.out_channels
        for s in module.stride:
            read *= 1 / s if module.transposed else s
    device = device if device in _FLOPS else "cuda"
    moved = (1.0 + read) * itemsize / _BYTES[device]
    speed = _FLOPS[device]
    if device == "cpu" and itemsize == 4 and _is_winograd(module):
        speed *= _WINOGRAD
    return flops_per_value(module) / speed + moved


def _is_winograd(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
        and module.groups == 1
        and module.in_channels % 32 == module.out_channels % 32 == 0
    )


def price_per_byte(device: str) -> float:
    return _PRICE / _BYTES[device if device in _BYTES else "cuda"]


def parse_memory(memory: float | int | str) -> float | int | str:
    """``"auto"``, ``"min"``, a fraction as a float, bytes as an int.

    Raises:
        ValueError, TypeError: it is none of them.
    """
    rule = (
        'expected memory "auto", "min", a fraction of eager\'s bytes above 0, or a size like "6GiB"'
    )
    if isinstance(memory, str):
        if memory in ("auto", "min"):
            return memory
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", memory.strip())
        if not found:
            raise ValueError(f"{rule}, got {memory!r}")
        base = 1024 if found[3] else 1000
        return int(float(found[1]) * base ** " KMGT".index(found[2] or " "))
    if isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise TypeError(f"{rule}, got {memory!r}")
    if not memory > 0 or memory == float("inf"):
        raise ValueError(f"{rule}, got {memory!r}")
    return float(memory) if isinstance(memory, float) or memory == 1 else memory


def best(maps: Iterable[InnerMap], budget: int | None, price: float = 0.0) -> frozenset[str]:
    """The paths of the maps to keep: those whose sizes add up to at most `budget` bytes and that cost the least time, where
    a kept byte costs `price` seconds; of several such plans one of the fewest bytes.

    Exact where the sizes have a common divisor of at least the 2¹⁸th part of the budget (as the maps of one chain do);
    otherwise exact for sizes rounded up to such parts.
    """
    worth = [(m, m.seconds - price * m.nbytes) for m in maps]
    worth = [(m, gain) for m, gain in worth if gain > 0]
    if budget is None or sum(m.nbytes for m, _ in worth) <= budget:
        return frozenset(m.path for m, _ in worth)
    worth = [(m, gain) for m, gain in worth if m.nbytes <= budget]
    if not worth:
        return frozenset()
    unit = _unit([m.nbytes for m, _ in worth], budget)
    room = budget // unit
    # gains[b]: the most that b units can save; one table row for each map says whether it is among them.
    gains = torch.zeros(room + 1, dtype=torch.float64)
    taken = []
    for m, gain in worth:
        size = -(-m.nbytes // unit)
        if size > room:
            taken.append(None)
            continue
        candidate = gains[: room + 1 - size] + gain
        better = candidate > gains[size:]
        taken.append((size, better))
        gains[size:] = torch.where(better, candidate, gains[size:])
    left = int((gains >= gains[-1]).nonzero()[0])  # the fewest units of the best plans
    kept = set()
    for (m, _), row in zip(reversed(worth), reversed(taken), strict=True):
        if row is not None and left >= row[0] and bool(row[1][left - row[0]]):
            kept.add(m.path)
            left -= row[0]
    return frozenset(kept)


def frugal(maps: Iterable[InnerMap], budget: int, price: float, step_flops: int) -> frozenset[str]:
    """The plan of "auto": remakes what costs less time than its bytes are worth, the cheapest first, as long as that adds few
    FLOPs to the `step_flops` of a step; more only where `budget` asks for it."""
    maps = list(maps)
    kept = {m.path: m for m in maps}
    added = 0
    for m in sorted(maps, key=lambda m: m.seconds / max(m.nbytes, 1)):
        added += m.flops
        if m.seconds > price * m.nbytes or added > _AUTO_FLOPS * step_flops:
            break
        del kept[m.path]
    if sum(m.nbytes for m in kept.values()) <= budget:
        return frozenset(kept)
    return best(maps, budget, price)


def _unit(sizes: Sequence[int], budget: int) -> int:
    divisor = 0
    for size in sizes:
        divisor = _gcd(divisor, size)
    return max(divisor, -(-budget // 2**18))


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
