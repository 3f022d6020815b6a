"""Which inner maps of a model's chains are saved, and which are recomputed in backward.

Every inner map is read in backward. One that is not saved is recomputed once, by the link that made it: that costs the time of
one convolution, or of one pass over the map, and saves its bytes. So the maps are independent of each other, and the best plan
under a budget is the solution of a 0/1 knapsack problem.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch

from ..chain import Conv, Norm

# A saved byte is worth the time that moving so many takes: what makes "auto" give up memory that is nearly free.
_PRICE = 15.0
AUTO_FRACTION = 0.53  # of the bytes that eager saves, which "auto" stays below
_AUTO_FLOPS = 0.12  # of a step's, the most that "auto" adds for memory below that


@dataclass(frozen=True)
class Device:
    """What a device does, in round figures. (``calibrate=True`` measures instead.)

    Attributes:
        bandwidth: bytes that it reads or writes in a second.
        flops: of its convolutions in a second, by the bytes of a value.
        winograd: times as fast as others those are, in float, that csrc/cpu/winograd.h has.
        launch: seconds that a kernel takes besides.
        frugal: whether "auto" gives up what is nearly free to recompute where its budget does not ask for it.
    """

    bandwidth: float
    flops: Mapping[int, float]
    winograd: float = 1.0
    launch: float = 0.0
    frugal: bool = False

    @property
    def price_per_byte(self) -> float:
        """Seconds that a saved byte is worth to "auto"."""
        return _PRICE / self.bandwidth


CPU = Device(40e9, {2: 200e9, 4: 200e9, 8: 200e9}, winograd=1.8, frugal=True)
# Somewhat less than half of what the tensor cores can do. Convolutions in float are TF32's, unless
# torch.backends.cudnn.allow_tf32 is off.
_HOPPER = {2: 450e12, 4: 225e12, 8: 30e12}
H100 = Device(3.0e12, _HOPPER, launch=5e-6)
H200 = Device(4.3e12, _HOPPER, launch=5e-6)


def device_figures(device: torch.device) -> Device:
    """An H100's for every other GPU, as ratios are much the same, and for one that only stand-ins are on; an H200's for a larger one."""
    if device.type == "cpu":
        return CPU
    # Asking must not be what begins the use of CUDA: a process with stand-ins alone can fork.
    if device.type == "cuda" and torch.cuda.is_initialized():
        found = torch.cuda.get_device_properties(device)
        if "H200" in found.name or found.total_memory > 100e9:
            return H200
    return H100


class OutOfReach(ValueError):
    """A budget below what a model saves with nothing but the inputs of its chains."""


@dataclass(frozen=True)
class InnerMap:
    """A map between two links of a chain.

    Attributes:
        name: of the link whose result it is.
        nbytes: its size.
        flops: of recomputing it.
        seconds: the time of recomputing it.
    """

    name: str
    nbytes: int
    flops: int
    seconds: float

    def times(self, runs: int) -> "InnerMap":
        """The same in a graph that runs so often."""
        return InnerMap(self.name, self.nbytes * runs, self.flops * runs, self.seconds * runs)


def flops_per_value(op: Conv | Norm, weight: Sequence[int]) -> float:
    """Floating point operations for each value of a link's result: 0 for a batch norm. `weight` is the shape of a
    convolution's."""
    if not isinstance(op, Conv):
        return 0.0
    per_group = weight[0] // op.groups if op.transposed else weight[1]
    return 2.0 * per_group * prod(weight[2:]) / (prod(op.stride) if op.transposed else 1)


def seconds_per_value(
    op: Conv | Norm, weight: Sequence[int], itemsize: int, device: Device
) -> float:
    """Of recomputing the result of a convolution, or, by one pass, of a batch norm, beside the launch."""
    read, speed = 1.0, device.flops[itemsize]
    if isinstance(op, Conv):
        into, out = (
            (weight[0], weight[1] * op.groups)
            if op.transposed
            else (weight[1] * op.groups, weight[0])
        )
        read = into / out * prod([1 / s if op.transposed else s for s in op.stride])
        if itemsize == 4 and _is_winograd(op, weight):
            speed *= device.winograd
    return flops_per_value(op, weight) / speed + (1.0 + read) * itemsize / device.bandwidth


def _is_winograd(op: Conv, weight: Sequence[int]) -> bool:
    plain = not op.transposed and op.groups == 1 and {*op.stride, *op.dilation} == {1}
    return plain and tuple(weight[2:]) == (3, 3) and weight[0] % 32 == weight[1] % 32 == 0


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


def knapsack(maps: Iterable[InnerMap], budget: int | None, price: float = 0.0) -> frozenset[str]:
    """The names of the maps to save: those whose sizes add up to at most `budget` bytes and that cost the least time, where
    a saved byte costs `price` seconds; of several such plans one of the fewest bytes.

    Exact where the sizes have a common divisor of at least the 2¹⁸th part of the budget (as the maps of one chain do);
    otherwise exact for sizes rounded up to such parts.
    """
    worth = [(m, m.seconds - price * m.nbytes) for m in maps]
    worth = [(m, gain) for m, gain in worth if gain > 0]
    if budget is None or sum(m.nbytes for m, _ in worth) <= budget:
        return frozenset(m.name for m, _ in worth)
    worth = [(m, gain) for m, gain in worth if m.nbytes <= budget]
    if not worth:
        return frozenset()
    unit = _unit([m.nbytes for m, _ in worth], budget)
    room = budget // unit
    # gains[b]: the most that b units can save; one table row for each map says whether it is among them.
    gains = torch.zeros(room + 1, dtype=torch.float64, device="cpu")
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
    saved = set()
    for (m, _), row in zip(reversed(worth), reversed(taken), strict=True):
        if row is not None and left >= row[0] and bool(row[1][left - row[0]]):
            saved.add(m.name)
            left -= row[0]
    return frozenset(saved)


def auto_plan(
    maps: Iterable[InnerMap], budget: int, price: float, step_flops: int
) -> frozenset[str]:
    """The plan of "auto": recomputes what costs less time than its bytes are worth, the cheapest first, as long as that adds few
    FLOPs to the `step_flops` of a step; more only where `budget` asks for it."""
    maps = list(maps)
    saved = {m.name: m for m in maps}
    added = 0
    for m in sorted(maps, key=lambda m: m.seconds / max(m.nbytes, 1)):
        added += m.flops
        if m.seconds > price * m.nbytes or added > _AUTO_FLOPS * step_flops:
            break
        del saved[m.name]
    if sum(m.nbytes for m in saved.values()) <= budget:
        return frozenset(saved)
    return knapsack(maps, budget, price)


def _unit(sizes: Sequence[int], budget: int) -> int:
    return max(gcd(*sizes), -(-budget // 2**18))


class Plan:
    """Which of a model's inner maps are saved, in every capture of it.

    Attributes:
        memory: what was asked for.
        saved: the names of the maps that are saved.
        known: those that were decided about.
        parts: the number of graphs where the model's breaks, else 0.
        complete: whether the whole model was looked at, so that a map that is not known comes from a branch not taken then.
    """

    def __init__(self, memory: float | int | str) -> None:
        self.memory = memory
        self.saved: set[str] = set()
        self.known: set[str] = set()
        self.complete = memory == "min"
        self.parts = 0  # graphs that the model breaks into, if it does
        self.spent = 0  # bytes, by the graphs that were decided about

    def decide(
        self, maps: Sequence[InnerMap], eager: int, least: int, step_flops: int, device: Device
    ) -> None:
        """Decides about maps of graphs that save `eager` bytes as they were and `least` with none of them.

        Raises:
            OutOfReach: the budget is less than that.
        """
        saved = self._choice(maps, eager, least, step_flops, device)
        self.saved |= saved
        self.known |= {m.name for m in maps}
        self.spent += least + sum(m.nbytes for m in maps if m.name in saved)

    def _choice(
        self, maps: Sequence[InnerMap], eager: int, least: int, step_flops: int, device: Device
    ) -> frozenset[str]:
        memory = self.memory
        if memory == "min":
            return frozenset()
        if memory == "auto":
            budget = max(int(AUTO_FRACTION * eager) - least, 0)
            if device.frugal:
                return auto_plan(maps, budget, device.price_per_byte, step_flops)
            return knapsack(maps, budget)
        budget = int(memory * eager) if isinstance(memory, float) else memory - self.spent
        if budget < least:
            raise OutOfReach(
                f"fuse: expected memory of at least {least + self.spent} bytes ({least / max(eager, 1):.3f} of the {eager} "
                f"bytes that eager saves for these inputs), the least that can be reached, got {memory!r}"
                + (f", which is {budget} bytes" if isinstance(memory, float) else "")
            )
        return knapsack(maps, budget - least)

    def of(self, maps: Sequence[InnerMap], device: Device) -> set[str]:
        """The names of the maps of a capture that are saved; one that is not known by its price alone, on every device: no
        budget says how much must be given up."""
        found = {m.name for m in maps if m.name in self.saved}
        if self.memory == "auto":
            unknown = [m for m in maps if m.name not in self.known]
            found |= knapsack(unknown, None, device.price_per_byte)
        return found
