"""Which inner maps of a model's chains are saved, and which are recomputed in backward.

Backward reads every inner map. A map that is not saved is recomputed once, by its link: that costs
the time of one convolution, or of one pass over the map, and its bytes need not be saved. So the
maps are independent of each other, and the fastest plan under a budget is the solution of a 0/1
knapsack problem.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import TYPE_CHECKING

import torch

from ..chain import Conv, Link

if TYPE_CHECKING:
    from .curve import Curve, Point

# "auto" saves a map only if recomputing it takes longer than moving so many times its bytes.
_PRICE = 15.0
AUTO_FRACTION = 0.53  # of eager's bytes: the budget of "auto"
_AUTO_FLOPS = 0.12  # of a step's FLOPs: the most that "auto" adds to save less than its budget


@dataclass(frozen=True)
class Device:
    """The speed of a device, in round figures. (``calibrate=True`` measures instead.)

    Attributes:
        bandwidth: bytes that it reads or writes in a second.
        flops: FLOPs of its convolutions in a second, by the bytes of a value.
        winograd: how many times as fast a float convolution is by Winograd's algorithm.
        reorder: how many times as long as its maps' bytes alone a convolution takes to bring
            contiguous maps into formats of its own and back, by the bytes of a value.
        launch: seconds that the launch of a kernel takes.
        wide: the channels of a group that its convolutions need to be as fast as that; with fewer
            they are slower in proportion, but not below `least_flops`.
        auto_saves_less: whether "auto" recomputes maps that are nearly free to recompute although
            its budget has room for them.
    """

    bandwidth: float
    flops: Mapping[int, float]
    winograd: float = 1.0
    reorder: Mapping[int, float] = field(default_factory=dict)
    launch: float = 0.0
    wide: int = 1
    least_flops: float = 0.0
    auto_saves_less: bool = False

    @property
    def price_per_byte(self) -> float:
        """The most seconds that "auto" spends on recomputing a byte instead of saving it."""
        return _PRICE / self.bandwidth

    def conv_flops(self, itemsize: int, channels: float) -> float:
        """FLOPs in a second of a convolution that reads so many channels in a group."""
        full = self.flops.get(itemsize, self.flops[4])
        return max(full * min(1.0, channels / self.wide), min(full, self.least_flops))


_HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
_CORES = {2: 450e9 if _HAS_BF16 else 200e9, 4: 200e9, 8: 200e9}
CPU = Device(40e9, _CORES, winograd=1.8, reorder={2: 8.0, 4: 4.0, 8: 4.0}, auto_saves_less=True)
# Somewhat less than half of the tensor cores' peak. Convolutions in float use TF32, unless
# torch.backends.cudnn.allow_tf32 is off.
_HOPPER = {2: 450e12, 4: 225e12, 8: 30e12}
H100 = Device(3.0e12, _HOPPER, launch=5e-6, wide=64, least_flops=10e12)
H200 = replace(H100, bandwidth=4.3e12)


def device_figures(device: torch.device) -> Device:
    """The figures of a CPU; of an H200 for a GPU with as much memory; of an H100 for any other GPU,
    as the ratios are similar, and where all tensors are stand-ins, so that CUDA is not in use."""
    if device.type == "cpu":
        return CPU
    # The question must not initialise CUDA: a process that has only stand-ins can still fork.
    if device.type == "cuda" and torch.cuda.is_initialized():
        found = torch.cuda.get_device_properties(device)
        if "H200" in found.name or found.total_memory > 100e9:
            return H200
    return H100


Boundary = tuple[str, str]  # of a segment: "before" or "after", and the name of a chain


class OutOfReach(ValueError):
    """A budget below the least that is possible."""


@dataclass(frozen=True)
class InnerMap:
    """A map between two links of a chain.

    Attributes:
        name: of the link whose result it is.
        nbytes: its size.
        flops, seconds: the cost of recomputing it.
    """

    name: str
    nbytes: int
    flops: int
    seconds: float

    def times(self, runs: int) -> "InnerMap":
        """The map in a graph that runs so often."""
        return InnerMap(self.name, self.nbytes * runs, self.flops * runs, self.seconds * runs)


def flops_per_value(op: Link, weight: Sequence[int]) -> float:
    """Floating point operations for each value of a link's result: 0 for a batch norm. `weight` is
    the shape of a convolution's weight."""
    if not isinstance(op, Conv):
        return 0.0
    each = 2.0 * group_channels(weight, op.transposed, op.groups) * prod(weight[2:])
    return each / (prod(op.stride) if op.transposed else 1)


def group_channels(weight: Sequence[int], transposed: bool, groups: int) -> int:
    """The channels that a group of a convolution reads."""
    return weight[0] // groups if transposed else weight[1]


def seconds_per_value(
    op: Link,
    weight: Sequence[int],
    itemsize: int,
    device: Device,
    *,
    contiguous: bool = False,
) -> float:
    """Seconds to recompute a value of the result of a convolution, or of a batch norm (one pass),
    without the launch. `contiguous` says that the maps are, and not channels last."""
    read, speed = 1.0, device.flops[itemsize]
    moved = itemsize / device.bandwidth
    if isinstance(op, Conv):
        speed = device.conv_flops(itemsize, group_channels(weight, op.transposed, op.groups))
        into, out = (
            (weight[0], weight[1] * op.groups)
            if op.transposed
            else (weight[1] * op.groups, weight[0])
        )
        read = into / out * prod([1 / s if op.transposed else s for s in op.stride])
        if contiguous:
            moved *= 1.0 + device.reorder.get(itemsize, 0.0)
        elif itemsize == 4 and is_winograd(op, weight):  # channels last
            speed *= device.winograd
    return flops_per_value(op, weight) / speed + (1.0 + read) * moved


def is_winograd(op: Conv, weight: Sequence[int]) -> bool:
    options = op.stride, op.dilation, op.transposed, op.groups
    return bool(torch.ops.fusedconvbn._winograd_takes(weight, *options))


# What torch.compiler.assume_constant_result does, without its import of Dynamo: the compiler asks,
# and its graph has the answer.
is_winograd._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Peak:
    """A budget for the peak of a whole step.

    Attributes:
        nbytes: the budget.
        static: of it, what parameters, buffers, inputs and the optimizer take all the time.
        least: what the optimizer's step takes, whatever the plan.
    """

    nbytes: int
    static: int = 0
    least: int = 0


Memory = float | int | str | Peak
_LEAST_BYTES = 1000  # of an int: a smaller one is taken for a fraction or a percentage


def parse_memory(memory: float | int | str) -> Memory:
    """``"auto"``, ``"min"``, a fraction as a float or a string like ``"40%"``, bytes as an int or a
    string like ``"6GiB"``, or a peak.

    Raises:
        ValueError, TypeError: it is none of these.
    """
    rule = (
        'expected memory "auto", "min", a fraction of eager\'s bytes above 0 as a float or "40%", '
        'a size as an int or "6GiB", or a peak like "peak 12GiB"'
    )
    if isinstance(memory, str):
        if memory in ("auto", "min"):
            return memory
        if percent := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", memory.strip()):
            return parse_memory(float(percent[1]) / 100)
        found = re.fullmatch(r"(peak\s+)?(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", memory.strip())
        if not found:
            raise ValueError(f"{rule}, got {memory!r}")
        base = 1024 if found[4] else 1000
        nbytes = int(float(found[2]) * base ** " KMGT".index(found[3] or " "))
        return Peak(nbytes) if found[1] else nbytes
    if isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise TypeError(f"{rule}, got {memory!r}")
    if not memory > 0 or memory == float("inf"):
        raise ValueError(f"{rule}, got {memory!r}")
    if isinstance(memory, int) and memory < _LEAST_BYTES:
        fraction = 1.0 if memory == 1 else memory / 100
        raise ValueError(
            f"{rule}, got {memory!r}, an int, which stands for bytes; write {fraction} or "
            f"'{fraction:.0%}' for a fraction"
        )
    return memory


def knapsack(maps: Iterable[InnerMap], budget: int | None, price: float = 0.0) -> frozenset[str]:
    """The names of the maps to save: at most `budget` bytes, such that recomputing the others, plus
    `price` seconds for each saved byte, takes the least time. Of several such plans it is one of
    the fewest bytes.

    Exact where the sizes have a common divisor of at least the 2¹⁸th part of the budget (as the
    maps of one chain do); otherwise exact for sizes rounded up to such parts.
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
    # gains[b]: the most time that b units of saved maps can gain. For each map a row says for which
    # b it is among them.
    gains = torch.zeros(room + 1, dtype=torch.float64, device="cpu")
    taken: list[tuple[int, torch.Tensor] | None] = []
    for m, gain in worth:
        size = -(-m.nbytes // unit)
        if size > room:
            taken.append(None)
            continue
        candidate = gains[: room + 1 - size] + gain
        better = candidate > gains[size:]
        taken.append((size, better))
        gains[size:] = torch.where(better, candidate, gains[size:])
    left = int((gains >= gains[-1]).nonzero()[0])  # the fewest units that gain the most
    saved = set()
    for (m, _), row in zip(reversed(worth), reversed(taken), strict=True):
        if row is not None and left >= row[0] and bool(row[1][left - row[0]]):
            saved.add(m.name)
            left -= row[0]
    return frozenset(saved)


def relaxed_seconds(maps: Iterable[InnerMap], budget: int) -> float:
    """A lower bound of the seconds that recomputing takes within a budget: of plans that may save a
    fraction of a map."""
    room, seconds = float(budget), 0.0
    for m in sorted(maps, key=lambda m: m.nbytes / max(m.seconds, 1e-12)):
        share = min(1.0, room / max(m.nbytes, 1))
        room -= share * m.nbytes
        seconds += (1 - share) * m.seconds
    return seconds


def auto_plan(
    maps: Iterable[InnerMap], budget: int, price: float, step_flops: int
) -> frozenset[str]:
    """The maps that "auto" saves on a device with `auto_saves_less`. It recomputes maps that cost
    less time than their bytes are worth, the cheapest first, until a share of the `step_flops` of a
    step is added. Where that does not come down to `budget`, the knapsack decides."""
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
        memory: the budget, as the user wrote it.
        saved: the names of the maps that are saved.
        segments: by their first and last boundaries, the maps that they save while their backward
            runs.
        known: the names of the maps that were decided about.
        eager, spent: the bytes that the graphs save that were decided about, unfused and fused.
        peak: of a budget for it, what the plan needs by the planner's estimate.
        added_flops, added_seconds: of recomputing in a step of these graphs.
        parts: the number of graphs that the model breaks into, or 0 if it is one graph.
        autocast: for which types of device it was on when the plan was made, and with which type.
        complete: whether the whole model was captured; a map that is not known then comes from a
            branch that was not taken.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.saved: set[str] = set()
        self.segments: dict[tuple[Boundary, Boundary], frozenset[str]] = {}
        self.known: set[str] = set()
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
        self.complete = memory == "min"
        self.parts = 0
        self.eager = self.spent = self.added_flops = self.peak = 0
        self.added_seconds = 0.0

    @property
    def has_budget(self) -> bool:
        return not isinstance(self.memory, str)

    @property
    def share(self) -> float:
        """Of what eager saves, what is saved."""
        return self.spent / max(self.eager, 1)

    def decide(
        self,
        maps: Sequence[InnerMap],
        eager: int,
        least: int,
        step_flops: int,
        device: Device,
        curve: "Curve | None" = None,
    ) -> None:
        """Decides about the maps of graphs that save `eager` bytes unfused and `least` bytes with
        no inner map saved, and, with the `curve` of the graph, about its segments.

        Raises:
            OutOfReach: the budget is less than the least that is possible.
        """
        self.known |= {m.name for m in maps}
        self.eager += eager
        if self.has_budget and curve is not None:
            return self._take(curve, eager)
        if not self.has_budget:
            saved = self._named_plan(maps, eager, least, step_flops, device)
        else:
            budget = self._budget(eager)
            if budget < least:
                raise OutOfReach(self._out_of_reach(budget, least, eager))
            saved = knapsack(maps, budget - least)
        self.saved |= saved
        again = [m for m in maps if m.name not in saved]
        nbytes = least + sum(m.nbytes for m in maps if m.name in saved)
        self._add(nbytes, sum(m.flops for m in again), sum(m.seconds for m in again))

    def _take(self, curve: "Curve", eager: int) -> None:
        """Takes the fastest plan of a curve within the budget."""
        if isinstance(self.memory, Peak):
            point = self._with_peak(curve, self.memory)
        else:
            budget = self._budget(eager)
            found = curve.within(budget)
            if found is None:
                raise OutOfReach(self._out_of_reach(budget, curve.floor(), eager))
            point = found
        self.saved |= point.names
        self.segments |= curve.segments(point)
        self._add(point.saved, point.flops, point.seconds)

    def _add(self, nbytes: int, flops: int, seconds: float) -> None:
        self.spent += nbytes
        self.added_flops += flops
        self.added_seconds += seconds

    def _with_peak(self, curve: "Curve", budget: Peak) -> "Point":
        point = curve.with_peak(budget.nbytes - budget.static)
        if point is None or budget.nbytes < budget.least:
            least = max(budget.static + curve.lowest().peak, budget.least)
            raise OutOfReach(
                f"fuse: expected memory with a peak of at least {least} bytes, the least that is "
                f"possible, got {budget.nbytes}"
            )
        self.peak = max(budget.static + point.peak, budget.least)
        return point

    def _named_plan(
        self, maps: Sequence[InnerMap], eager: int, least: int, step_flops: int, device: Device
    ) -> frozenset[str]:
        if self.memory == "min":
            return frozenset()
        budget = max(int(AUTO_FRACTION * eager) - least, 0)
        if device.auto_saves_less:
            return auto_plan(maps, budget, device.price_per_byte, step_flops)
        return knapsack(maps, budget)

    def _budget(self, eager: int) -> int:
        """The bytes of a fraction, or those that are left."""
        memory = self.memory
        assert isinstance(memory, (int, float))
        return int(memory * eager) if isinstance(memory, float) else memory - self.spent

    def _out_of_reach(self, budget: int, floor: int, eager: int) -> str:
        found = str(self.memory)
        if isinstance(self.memory, float):
            found = f"{self.memory!r}, which is {budget} bytes"
        return (
            f"fuse: expected memory of at least {floor + self.spent} bytes "
            f"({floor / max(eager, 1):.3f} of the {eager} bytes that eager saves for these "
            f"inputs), the least that is possible, got {found}"
        )

    def of(self, maps: Sequence[InnerMap], device: Device) -> set[str]:
        """The names of the maps of a capture that are saved. With "auto" the price alone decides
        about a map that is not known, as no budget applies to it."""
        found = {m.name for m in maps if m.name in self.saved}
        if self.memory == "auto":
            unknown = [m for m in maps if m.name not in self.known]
            found |= knapsack(unknown, None, device.price_per_byte)
        return found
