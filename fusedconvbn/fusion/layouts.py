"""Layouts: which intervals of a graph's parts are segments, which run again in backward and save
their inputs alone.

The layouts that are worth anything are those that are the cheapest for some price of a byte: for
each price, the cheapest layout is a shortest path along the row of parts, whose steps are single
parts and segments. Saved bytes are exact; peaks and seconds are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from .graph import Graph
from .parts import Part, parts_of
from .plan import InnerMap
from .segments import Intervals
from .step import step_memory

_PRICES = tuple(2.0 ** (i / 4) for i in range(-8, 53))  # of a byte, in passes over it
# The peaks for which layouts are always looked for, as shares of that of the plan without segments
# that saves least.
_PEAKS = tuple(0.05 * i for i in range(12, 21))
# What a segment saves of its own: see Choice. Prices of a byte, in those of "auto".
_LOCAL = (1.0, 2.0, 4.0, math.inf)


def _peaks_of(
    own: dict[fx.Node, set[int]], found: list[tuple[frozenset[int], int]]
) -> Callable[[fx.Node], int]:
    """The peak of each chain, by what it alone reads. One that reads nothing alone, or only copies,
    as autocast makes of weights, has the highest peak of those that belong to no other."""
    known = set[int]().union(*own.values())
    others = [peak for read, peak in found if not read & known]

    def peak(chain: fx.Node) -> int:
        return max([peak for read, peak in found if read & own[chain]] or others, default=0)

    return peak


@dataclass
class Choice:
    """Which inner maps the chains of a segment save while its backward runs: those that take more
    than `price` seconds a byte to recompute.

    Attributes:
        saved: their names.
        seconds, flops: that the segment adds to a step.
        live: the most bytes that are live in its forward and backward, beside its inputs and what
            is saved in front of it.
    """

    price: float
    saved: tuple[str, ...] = ()
    seconds: float = 0.0
    flops: int = 0
    live: int = 0
    _alive: int = 0

    def with_part(self, part: Part, own: int, more: int, before: int) -> Choice:
        """For the segment that one more part belongs to. `own` are the bytes that the part saves,
        `more` those that are live beside what is saved, `before` those of the results of the
        segment so far that are still to be read."""
        saved = [m for m in part.maps if m.seconds > self.price * m.nbytes]
        again = [m for m in part.maps if m.seconds <= self.price * m.nbytes]
        alive = self._alive + own + sum(m.nbytes for m in saved)
        return Choice(
            self.price,
            (*self.saved, *(m.name for m in saved)),
            self.seconds + part.seconds + sum(m.seconds for m in again),
            self.flops + part.flops + sum(m.flops for m in again),
            max(self.live, alive + part.working + more, before + part.forward),
            alive,
        )


@dataclass(frozen=True, eq=False)
class Segment:
    """Parts `first` … `last` - 1 of a row.

    Attributes:
        inputs, results: bytes of those inputs that are saved for no other reason, and of those
            results that are saved for what is behind it.
        choices: the first is the fastest, and needs the most memory.
    """

    first: int
    last: int
    inputs: int
    results: int
    choices: tuple[Choice, ...]

    def within(self, room: float) -> Choice | None:
        """The fastest choice that needs at most so many bytes."""
        return next((c for c in self.choices if c.live <= room), None)


Layout = tuple[Segment, ...]


class Row:
    """The parts of a graph, and its layouts."""

    def __init__(self, graph: Graph) -> None:
        least = graph.least
        self.graph, self.parts, self.nbytes = graph, parts_of(graph), least.nbytes
        self._maker = {s: i for i, part in enumerate(self.parts) for s in part.makes}
        self._last_read = {s: i for i, part in enumerate(self.parts) for s in part.reads}
        self._saved = saved = set().union(*(part.saves for part in self.parts))
        inputs = (n.name for n in graph.module.graph.nodes if n.op == "placeholder")
        given = saved & set().union(*(least.holds[name] for name in inputs))
        # Bytes of what is saved where nothing is a segment: inputs of the graph, and the others at
        # the part that makes them.
        self._given = self._bytes(given)
        self._own = [
            self._bytes((p.makes & saved) | (p.saves - self._maker.keys() - given))
            for p in self.parts
        ]
        self._grads = [sum(p.grads for p in self.parts[i:]) for i in range(len(self.parts))]
        nodes = list(graph.module.graph.nodes)
        self._index, self._intervals = {n: i for i, n in enumerate(nodes)}, Intervals(nodes)
        self._set_working()
        # Bytes that are counted at a part although a later part is the first to save them.
        self._later = [
            self._given
            + sum(self._own[: i + 1])
            - self._bytes(set().union(*(p.saves for p in self.parts[: i + 1])))
            for i in range(len(self.parts))
        ]
        self._segments = [list(self._segments_from(i)) for i in range(len(self.parts))]
        self._layouts: dict[float, dict[Layout, int]] = {}
        most, _ = self.live((), frozenset())
        self._always = [share * most for share in _PEAKS]

    def layouts(self, peak: float) -> dict[Layout, int]:
        """Layouts for this peak, and some for lower ones, with the bytes that each saves with no
        inner map saved."""
        found = {(): self.least(())}
        for most in (*self._always, peak):
            if most not in self._layouts:
                prices = (price / self.graph.device.bandwidth for price in _PRICES)
                of_peak = dict.fromkeys(self._cheapest(price, most) for price in prices)
                self._layouts[most] = {layout: self.least(layout) for layout in of_peak}
            found |= self._layouts[most]
        return found

    def _set_working(self) -> None:
        """Simulates a step that saves no inner map, and leaves out what is counted otherwise: what
        is saved and the gradients of the parameters."""
        graph, alive = self.graph, 0
        inputs = [n for n in graph.module.graph.nodes if n.op == "placeholder"]
        at = {n: i for i, n in enumerate(inputs)}
        step = step_memory(graph.module, graph.example_inputs)
        readers = Counter(n for call, _ in graph.calls for n in {*call.args[0]} if n in at)
        own = {c: {at[n] for n in c.args[0] if readers[n] == 1} for c, _ in graph.calls}
        peaks = [_peaks_of(own, found) for found in (step.forward, step.backward)]
        saved = set[int]()
        for part, grads in zip(self.parts, self._grads, strict=True):
            before, saved = alive, saved | part.saves
            alive = self._bytes(saved)
            for call, _ in graph.calls:
                if part.first <= self._index[call] < part.last:
                    forward, backward = (of(call) for of in peaks)
                    part.forward = max(part.forward, forward - before)
                    part.working = max(part.working, backward - alive - grads)

    def _bytes(self, storages: Iterable[int]) -> int:
        return sum(self.nbytes[s] for s in storages)

    def _segments_from(self, i: int) -> Iterator[Segment]:
        """The segments that begin with part i."""
        if not self.parts[i].begin[0]:
            return
        ends = set(self._intervals.ends(self.parts[i].first))
        price = self.graph.device.price_per_byte
        made, read, results = set[int](), set[int](), 0
        choices = [Choice(price * share) for share in _LOCAL]
        for j in range(i, len(self.parts)):
            part = self.parts[j]
            if part.last not in ends:
                return
            made, read = made | part.makes, read | part.reads
            more = self._grads[j] - self._later[j]
            choices = [c.with_part(part, self._own[j], more, results) for c in choices]
            results = self._bytes(s for s in made if self._last_read.get(s, -1) > j)
            if part.end[0]:
                alone = read - made - self._saved
                ahead = (s for s in made & self._saved if self._last_read.get(s, -1) > j)
                yield Segment(i, j + 1, self._bytes(alone), self._bytes(ahead), tuple(choices))

    def _cheapest(self, price: float, most: float) -> Layout:
        """The layout with the least seconds plus `price` for each saved byte, of those whose peak
        is at most `most`; () if there is none."""
        # Of each boundary: the cost up to it, the bytes that are saved in front of it, the last
        # boundary on the way, and the segment between the two.
        best: dict[int, tuple[float, int, int, Segment | None]] = {0: (0.0, self._given, 0, None)}

        def offer(j: int, cost: float, saved: int, i: int, segment: Segment | None = None) -> None:
            if j not in best or cost < best[j][0]:
                best[j] = (cost, saved, i, segment)

        for i, part in enumerate(self.parts):
            if i not in best:
                continue
            cost, before, *_ = best[i]
            room = most - before
            saved = [m for m in part.maps if m.seconds > price * m.nbytes]
            nbytes = self._own[i] + sum(m.nbytes for m in saved)
            seconds = sum(m.seconds for m in part.maps if m not in saved)
            live = nbytes + part.working + self._grads[i] - self._later[i]
            if max(live, part.forward) <= room:
                offer(i + 1, cost + price * nbytes + seconds, before + nbytes, i)
            for segment in self._segments[i]:
                if choice := segment.within(room - segment.inputs):
                    nbytes = segment.inputs + segment.results
                    total = cost + price * nbytes + choice.seconds
                    offer(segment.last, total, before + nbytes, i, segment)
        layout, at = [], len(self.parts)
        while at in best and at > 0:
            *_, at, segment = best[at]
            layout += [segment] if segment else []
        return tuple(reversed(layout))

    def outside(self, layout: Layout) -> list[Part]:
        """The parts that are in no segment."""
        inside = {i for s in layout for i in range(s.first, s.last)}
        return [part for i, part in enumerate(self.parts) if i not in inside]

    def least(self, layout: Layout) -> int:
        """Bytes that are saved with no inner map saved."""
        plain = (p.saves for p in self.outside(layout))
        return self._bytes(set().union(*plain, *map(self.inputs, layout)))

    def inputs(self, segment: Segment) -> set[int]:
        """The storages that a segment saves."""
        parts = self.parts[segment.first : segment.last]
        read = set().union(*(p.reads for p in parts))
        return read - set().union(*(p.makes for p in parts))

    def maps(self, layout: Layout) -> list[InnerMap]:
        """The inner maps outside the segments."""
        return [m for part in self.outside(layout) for m in part.maps]

    def live(self, layout: Layout, saved: frozenset[str]) -> tuple[int, list[int]]:
        """The most bytes that are live outside the segments, if these inner maps are saved; and of
        each segment the bytes of its inputs and of what is saved in front of it."""
        starts = {s.first: s for s in layout}
        storages, alive, maps, peak, in_front, i = set[int](), 0, 0, 0, [], 0
        while i < len(self.parts):
            part, before = self.parts[i], alive
            if segment := starts.get(i):
                storages |= self.inputs(segment)
                alive = self._bytes(storages) + maps
                in_front.append(alive)
                i = segment.last
            else:
                storages |= part.saves
                maps += sum(m.nbytes for m in part.maps if m.name in saved)
                alive = self._bytes(storages) + maps
                peak = max(peak, alive + part.working + self._grads[i], before + part.forward)
                i += 1
        return peak, in_front
