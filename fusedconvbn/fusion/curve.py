"""The plans of a model for every budget: which of its parts are segments, which run again in
backward and save their inputs alone, and which of the other inner maps are saved.

A captured graph is a row of parts. A layout makes intervals of them segments. The layouts that are
worth anything are those that are the cheapest for some price of a byte: for each price, the
cheapest layout is a shortest path along the row, whose steps are single parts and segments. Within
a layout and a budget, the fastest plan is a knapsack problem (plan.py).

All bytes and seconds are estimates, but for the saved bytes, which are exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor, fx

from .graph import Graph, inner_map
from .nodes import nbytes_of, value
from .plan import Boundary, InnerMap, knapsack, relaxed_seconds
from .profile import Profile
from .segments import Intervals, boundaries, reads
from .step import step_memory

_MOST_PARTS = 72
_TRIES = 4  # to reach a peak
_STEPS = 16  # of the curve without segments, and of the rest of it
_PRICES = tuple(2.0 ** (i / 4) for i in range(-8, 53))  # of a byte, in passes over it
# The peaks for which layouts are looked for, and the most that plans with segments should have:
# shares of the peak of the plan without segments that saves least.
_PEAKS = tuple(0.05 * i for i in range(12, 21))
_LOWER = 0.95
# What a segment saves of its own: see Choice. Prices of a byte, in those of "auto".
_LOCAL = (1.0, 2.0, 4.0, math.inf)


@dataclass
class Part:
    """What runs between two neighbouring boundaries. Storages have numbers.

    Attributes:
        begin, end: the boundaries.
        first, last: the indices of its first node, and behind its last one.
        seconds, flops: of running it again.
        saves: the storages that it saves with no inner map saved.
        reads, makes: the storages that its nodes read, and those of their results.
        maps: its inner maps.
        grads: bytes of the gradients of its parameters.
        forward, working: bytes that its forward and its backward need besides, if it saves no inner
            map.
        random: whether it draws random numbers.
    """

    begin: Boundary
    end: Boundary
    first: int
    last: int
    seconds: float = 0.0
    flops: int = 0
    saves: set[int] = field(default_factory=set)
    reads: set[int] = field(default_factory=set)
    makes: set[int] = field(default_factory=set)
    maps: list[InnerMap] = field(default_factory=list)
    grads: int = 0
    forward: int = 0
    working: int = 0
    random: bool = False

    def join(self, other: Part) -> None:
        """Takes the part behind it in."""
        self.end, self.last = other.end, other.last
        self.seconds += other.seconds
        self.flops += other.flops
        self.saves |= other.saves
        self.reads |= other.reads
        self.makes |= other.makes
        self.maps += other.maps
        self.grads += other.grads
        self.forward = max(self.forward, other.forward)
        self.working = max(self.working, other.working)
        self.random |= other.random


def parts_of(graph: Graph, least: Profile) -> list[Part]:
    """The parts of a graph, between the boundaries that the fewest bytes cross."""
    nodes = list(graph.module.graph.nodes)
    names = {index: name for name, index in boundaries(nodes, graph.calls).items()}
    start = next(i for i, node in enumerate(nodes) if node.op not in ("placeholder", "get_attr"))
    ends = sorted({start, *names, len(nodes) - 1})
    maps, matches = {m.name: m for m in graph.maps}, dict(graph.calls)
    weights: set[fx.Node] = set()
    known = set[int]().union(*(least.holds[node.name] for node in nodes[:start]))
    parts = []
    for first, last in pairwise(ends):
        part = Part(names.get(first, ("", "")), names.get(last, ("", "")), first, last)
        for node in nodes[first:last]:
            part.saves |= least.saves[node.name]
            part.makes |= least.holds[node.name] - known  # the others are those of views
            known |= least.holds[node.name]
            part.flops += least.flops[node.name]
            part.random |= node.name in least.random
            for n in reads(node):
                if not _is_weight(n):
                    part.reads |= least.holds[n.name]
                elif n not in weights:
                    weights.add(n)
                    part.grads += nbytes_of(value(n))
            if node in matches:
                match = matches[node]
                part.maps += [maps[link.name] for link in match.inner() if link.name in maps]
                part.seconds += sum(
                    maps.get(link.name, inner_map(link, graph.device)).seconds
                    for link in match.links
                )
            else:
                part.seconds += least.flops[node.name] / graph.device.flops[4]
                part.seconds += _moved(node, least) / graph.device.bandwidth + graph.device.launch
        parts.append(part)
    return _few(parts, least)


def _is_weight(node: fx.Node) -> bool:
    t = value(node)
    return node.op == "placeholder" and isinstance(t, Tensor) and t.requires_grad


def _moved(node: fx.Node, least: Profile) -> int:
    """Bytes that a node reads and writes; 0 for a view."""
    own = least.holds[node.name]
    read = set().union(*(least.holds[n.name] for n in node.all_input_nodes))
    return 0 if own <= read else sum(least.nbytes[s] for s in own | read)


def _few(parts: list[Part], least: Profile) -> list[Part]:
    """At most `_MOST_PARTS` parts, joined first where more bytes cross the boundary between them
    than the next ones."""
    last_read = {s: i for i, part in enumerate(parts) for s in part.reads}
    crossing, live = [], set[int]()
    for i, part in enumerate(parts):
        live = {s for s in live | part.makes if last_read.get(s, -1) > i}
        crossing.append(sum(least.nbytes[s] for s in live))

    def is_low(i: int) -> bool:
        return crossing[i] <= min(crossing[max(i - 1, 0)], crossing[i + 1])

    # Of equally good ones, every second, then every fourth, and so on stays.
    order = sorted(range(len(parts) - 1), key=lambda i: (not is_low(i), -((i + 1) & -(i + 1)), i))
    kept = set(order[: _MOST_PARTS - 1])
    result = [parts[0]]
    for i, part in enumerate(parts[1:]):
        if i in kept:
            result.append(part)
        else:
            result[-1].join(part)
    return result


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

    def __init__(self, graph: Graph, least: Profile) -> None:
        self.graph, self.parts, self.nbytes = graph, parts_of(graph, least), least.nbytes
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
        saved = set[int]()
        for part, grads in zip(self.parts, self._grads, strict=True):
            before, saved = alive, saved | part.saves
            alive = self._bytes(saved)
            for call, _ in graph.calls:
                if part.first <= self._index[call] < part.last:
                    # Under autocast the operator reads copies of the convolutions' weights.
                    weights = {at[n] for n in call.args[0] if n in at and _is_weight(n)}
                    forward, backward = (
                        max((peak for read, peak in peaks if weights & read), default=0)
                        for peaks in (step.forward, step.backward)
                    )
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


@dataclass(frozen=True)
class Point:
    """A plan.

    Attributes:
        saved: bytes that it saves for backward.
        peak: an estimate of the most bytes that are live in a step, beside the parameters.
        seconds, flops: that recomputing adds to a step.
        names: the inner maps that it saves.
        layout: its segments.
    """

    saved: int
    peak: int
    seconds: float
    flops: int
    names: frozenset[str]
    layout: Layout


class Curve:
    """The fastest plan of a graph for each budget."""

    @classmethod
    def of(cls, graph: Graph) -> Curve | None:
        """None for a graph that cannot be simulated, as one that needs values, or that writes to
        statistics that it has read."""
        try:
            return cls(graph, graph.least)
        except RuntimeError:
            return None

    def __init__(self, graph: Graph, least: Profile) -> None:
        self.row = Row(graph, least)
        self._least = self.row.least(())

    def within(self, budget: int) -> Point | None:
        """The fastest plan that saves at most `budget` bytes; None if there is none. No plan with
        segments has a higher peak than the fastest one without them."""
        if budget < self._least:
            return self._at(budget, self._most)
        plain = self.point((), knapsack(self.row.maps(()), budget - self._least))
        return self._at(budget, plain.peak)

    def front(self) -> list[Point]:
        """Plans from the one that saves everything to the one that saves least. None takes longer
        than one that saves less. The peak of each is that of the plans behind it, too."""
        total, floor = sum(m.nbytes for m in self.row.maps(())), self.floor()
        budgets = [self._least + total * i // _STEPS for i in reversed(range(_STEPS + 1))]
        budgets += [floor + (self._least - floor) * i // _STEPS for i in reversed(range(_STEPS))]
        found: list[Point] = []
        for point in map(self.within, budgets):
            while found and found[-1].seconds >= point.seconds:
                found.pop()
            found.append(point)
        peaks = [max(p.peak for p in found[i:]) for i in range(len(found))]
        return [replace(point, peak=peak) for point, peak in zip(found, peaks, strict=True)]

    def with_peak(self, peak: int) -> Point | None:
        """The fastest plan whose peak is at most `peak` bytes; None if there is none."""
        best, most = None, peak
        for _ in range(_TRIES):
            point = self._with_peak(most)
            if point is None or point.layout:
                return best or point
            # The estimate does not know which bytes of a backward the saved maps spare.
            real = self._simulated(point)
            if real <= peak and (best is None or point.seconds < best.seconds):
                best = point
            most += peak - real
        return best

    def _simulated(self, point: Point) -> int:
        """The peak of a plan without segments."""
        graph = self.row.graph
        graph.save(point.names)
        peak = step_memory(graph.module, graph.example_inputs).peak
        graph.save(())
        return peak

    def _with_peak(self, peak: int) -> Point | None:
        total = sum(m.nbytes for m in self.row.maps(()))
        budgets = (self._least + total * i // (4 * _STEPS) for i in range(4 * _STEPS + 1))
        lower = (self._least * i // _STEPS for i in range(1, _STEPS))
        found = [point for n in (*budgets, *lower) if (point := self._at(n, peak))]
        return min(found, key=lambda point: point.seconds, default=None)

    def lowest_peak(self) -> int:
        peaks = []
        for layout in self.row.layouts(self._most):
            peak, in_front = self.row.live(layout, frozenset())
            segments = zip(layout, in_front, strict=True)
            peaks.append(max([peak, *(n + s.choices[-1].live for s, n in segments)]))
        return min(peaks)

    def floor(self) -> int:
        """The fewest bytes that a plan saves."""
        layouts = self.row.layouts(self._most).items()
        return min(n for layout, n in layouts if self.point(layout, frozenset(), self._most))

    @functools.cached_property
    def _most(self) -> float:
        """The highest peak of a plan that saves less than any plan without segments: somewhat less
        than theirs, where that is possible."""
        peak = self.point((), frozenset()).peak
        lower = _LOWER * peak
        layouts = self.row.layouts(lower).items()
        enough = any(n < self._least // 4 and self.point(k, frozenset(), lower) for k, n in layouts)
        return lower if enough else peak

    def segments(self, point: Point) -> dict[tuple[Boundary, Boundary], bool]:
        """The boundaries of a plan's segments, and whether they draw random numbers."""
        inside = [self.row.parts[s.first : s.last] for s in point.layout]
        return {(p[0].begin, p[-1].end): any(part.random for part in p) for p in inside}

    def _at(self, budget: int, peak: float) -> Point | None:
        """The fastest plan that saves at most `budget` bytes and has at most this peak."""
        best: Point | None = None
        possible = {n: budget - least for n, least in self.row.layouts(peak).items()}
        bounds = {n: self._bound(n, room) for n, room in possible.items() if room >= 0}
        for layout in sorted(bounds, key=bounds.__getitem__):
            if best is not None and bounds[layout] >= best.seconds:
                break
            room = possible[layout]
            point = self.point(layout, knapsack(self.row.maps(layout), room), peak)
            if point is not None and (best is None or point.seconds < best.seconds):
                best = point
        return best

    def _bound(self, layout: Layout, room: int) -> float:
        """No plan of the layout takes less."""
        again = relaxed_seconds(self.row.maps(layout), room)
        return sum(s.choices[0].seconds for s in layout) + again

    def point(self, layout: Layout, names: frozenset[str], most: float = math.inf) -> Point | None:
        """The fastest plan of a layout that saves the inner maps `names` outside its segments and
        whose peak is at most `most`."""
        maps = self.row.maps(layout)
        again = [m for m in maps if m.name not in names]
        peak, in_front = self.row.live(layout, names)
        choices = [s.within(most - n) for s, n in zip(layout, in_front, strict=True)]
        if peak > most or None in choices:
            return None
        return Point(
            self.row.least(layout) + sum(m.nbytes for m in maps if m.name in names),
            max([peak, *(n + c.live for n, c in zip(in_front, choices, strict=True))]),
            sum(c.seconds for c in choices) + sum(m.seconds for m in again),
            sum(c.flops for c in choices) + sum(m.flops for m in again),
            names.union(*(c.saved for c in choices)),
            layout,
        )
