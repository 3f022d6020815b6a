"""The fastest plans of a model for every budget: a layout of segments (layouts.py), and which inner
maps outside them are saved, which is a knapsack problem (plan.py)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from .graph import Graph
from .layouts import Layout, Row
from .plan import Boundary, knapsack, relaxed_seconds
from .step import step_memory

_TRIES = 4  # to reach a peak
_STEPS = 16  # of the curve without segments, and of the rest of it
_LOWER = 0.95  # of the peak of `"min"`: the most that plans with segments should have
_ROOMS = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a budget, where all of it would lift the peak too high


@dataclass(frozen=True)
class Point:
    """A plan.

    Attributes:
        saved: bytes that it saves for backward.
        peak: an estimate of the most bytes that are live in a step, beside the parameters.
        seconds, flops: that recomputing adds to a step.
        names: the inner maps that it saves outside its segments.
        layout: its segments.
        inside: the inner maps that each of these saves while its backward runs.
    """

    saved: int
    peak: int
    seconds: float
    flops: int
    names: frozenset[str]
    layout: Layout
    inside: tuple[frozenset[str], ...] = ()


class Curve:
    """The fastest plan of a graph for each budget."""

    @classmethod
    def of(cls, graph: Graph) -> Curve | None:
        """None for a graph that cannot be simulated, as one that needs values, or that writes to
        statistics that it has read."""
        try:
            return cls(graph)
        except torch.OutOfMemoryError:  # a convolution does not fit (cuda_libraries.py)
            raise
        except RuntimeError:
            return None

    def __init__(self, graph: Graph) -> None:
        self.row = Row(graph)
        self._least = self.row.least(())

    def within(self, budget: int) -> Point | None:
        """The fastest plan that saves at most `budget` bytes; None if there is none. No plan with
        segments has a higher peak than the fastest one without them."""
        if budget < self._least:
            return self._at(budget, self._most)
        plain = self._plain(knapsack(self.row.maps(()), budget - self._least))
        return self._at(budget, plain.peak)

    def front(self) -> list[Point]:
        """Plans from the one that saves everything to the one that saves least. None takes longer
        than one that saves less. The peak of each is that of the plans behind it, too."""
        total, floor = sum(m.nbytes for m in self.row.maps(())), self.floor()
        budgets = [self._least + total * i // _STEPS for i in reversed(range(_STEPS + 1))]
        budgets += [floor + (self._least - floor) * i // _STEPS for i in reversed(range(_STEPS))]
        found: list[Point] = []
        for point in filter(None, map(self.within, budgets)):
            while found and found[-1].seconds >= point.seconds:
                found.pop()
            found.append(point)
        peaks = [max(p.peak for p in found[i:]) for i in range(len(found))]
        return [replace(point, peak=peak) for point, peak in zip(found, peaks, strict=True)]

    def with_peak(self, peak: int) -> Point | None:
        """The fastest plan whose peak is at most `peak` bytes; None if there is none."""
        best: Point | None = None
        most = peak
        for _ in range(_TRIES):
            point = self._with_peak(most)
            if point is None:
                break
            if point.layout:
                return best or point
            # The estimate does not know which bytes of a backward the saved maps spare.
            real = self._simulated(point)
            if real <= peak and (best is None or point.seconds < best.seconds):
                best = replace(point, peak=real)
            most += peak - real
        lowest = self.lowest()
        return best or (lowest if lowest.peak <= peak else None)

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

    def lowest(self) -> Point:
        """The plan with the lowest peak."""
        point = self._with_peak(self._lowest_peak()) or self._plain(frozenset())
        return point if point.layout else replace(point, peak=self._simulated(point))

    def _lowest_peak(self) -> int:
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
        peak = self._plain(frozenset()).peak
        lower = _LOWER * peak
        layouts = self.row.layouts(lower).items()
        enough = any(n < self._least // 4 and self.point(k, frozenset(), lower) for k, n in layouts)
        return lower if enough else peak

    def segments(self, point: Point) -> dict[tuple[Boundary, Boundary], frozenset[str]]:
        """The segments of a plan, as :class:`Plan` has them."""
        parts = [self.row.parts[s.first : s.last] for s in point.layout]
        ends = [(inside[0].begin, inside[-1].end) for inside in parts]
        return dict(zip(ends, point.inside, strict=True))

    def _at(self, budget: int, peak: float) -> Point | None:
        """The fastest plan that saves at most `budget` bytes and has at most this peak."""
        best: Point | None = None
        possible = {n: budget - least for n, least in self.row.layouts(peak).items()}
        bounds = {n: self._bound(n, room) for n, room in possible.items() if room >= 0}
        for layout in sorted(bounds, key=bounds.__getitem__):
            if best is not None and bounds[layout] >= best.seconds:
                break
            maps = self.row.maps(layout)
            names = (knapsack(maps, int(share * possible[layout])) for share in _ROOMS)
            points = (self.point(layout, saved, peak) for saved in names)
            point = next((p for p in points if p is not None), None)
            if point is not None and (best is None or point.seconds < best.seconds):
                best = point
        return best

    def _bound(self, layout: Layout, room: int) -> float:
        """No plan of the layout takes less."""
        again = relaxed_seconds(self.row.maps(layout), room)
        return sum(s.choices[0].seconds for s in layout) + again

    def _plain(self, names: frozenset[str]) -> Point:
        """The plan without segments that saves these inner maps."""
        point = self.point((), names)
        assert point is not None  # no peak is too high for it
        return point

    def point(self, layout: Layout, names: frozenset[str], most: float = math.inf) -> Point | None:
        """The fastest plan of a layout that saves the inner maps `names` outside its segments and
        whose peak is at most `most`."""
        maps = self.row.maps(layout)
        again = [m for m in maps if m.name not in names]
        peak, in_front = self.row.live(layout, names)
        within = (s.within(most - n) for s, n in zip(layout, in_front, strict=True))
        choices = [choice for choice in within if choice is not None]
        if peak > most or len(choices) < len(layout):
            return None
        return Point(
            self.row.least(layout) + sum(m.nbytes for m in maps if m.name in names),
            max([peak, *(n + c.live for n, c in zip(in_front, choices, strict=True))]),
            sum(c.seconds for c in choices) + sum(m.seconds for m in again),
            sum(c.flops for c in choices) + sum(m.flops for m in again),
            names,
            layout,
            tuple(frozenset(c.saved) for c in choices),
        )
