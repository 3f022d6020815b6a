"""Measures how long recomputing each map of a model takes on its device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..chain import Conv
from .match import Link
from .nodes import value
from .plan import InnerMap

_RUNS = 10  # between two events


def measured_seconds(maps: list[InnerMap], links: list[Link]) -> list[InnerMap]:
    """The maps with the measured seconds of their links: of the convolution, or of one pass in
    place. Equal links are measured once."""
    known: dict[object, float] = {}
    result = []
    for m, link in zip(maps, links, strict=True):
        op = link.op
        key: object = tuple(value(link.result).shape)
        if isinstance(op, Conv):
            shapes = (tuple(value(n).shape) for n in (link.input, op.weight))
            key = (key, *shapes, str(op.options))
        if key not in known:
            known[key] = _seconds(link)
        result.append(replace(m, seconds=known[key]))
    return result


def _draw(like: Tensor) -> Tensor:
    return torch.empty_strided(
        like.shape, like.stride(), dtype=like.dtype, device=like.device
    ).fill_(0.5)


@torch.no_grad()
def _seconds(link: Link) -> float:
    op = link.op
    if not isinstance(op, Conv):
        t = _draw(value(link.result))
        return _median(lambda: t.mul_(1.0), t.device)
    x, weight = _draw(value(link.input)), _draw(value(op.weight)).to(value(link.result).dtype)
    x = x.to(weight.dtype)
    return _median(lambda: torch.convolution(x, weight, None, *op.options), x.device)


def _median(run: Callable[[], Tensor], device: torch.device) -> float:
    timed = _by_events if device.type == "cuda" else _by_clock
    return statistics.median([timed(run, device) for _ in range(4)][1:])


def _by_clock(run: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _by_events(run: Callable[[], Tensor], device: torch.device) -> float:
    """The mean of several runs in a row: the time of a single run would include the wait for its
    launch."""
    stream = torch.cuda.current_stream(device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record(stream)
    for _ in range(_RUNS):
        run()
    last.record(stream)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / _RUNS
