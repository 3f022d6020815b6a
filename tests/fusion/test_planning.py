"""The plan under a budget: exact, within it, and monotonic; and what it takes a device for."""

from dataclasses import replace
from itertools import chain, combinations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusedconvbn.chain import Conv, Norm
from fusedconvbn.fusion import calibration
from fusedconvbn.fusion.find import find
from fusedconvbn.fusion.graph import inner_map
from fusedconvbn.fusion.plan import (
    CPU,
    H100,
    H200,
    InnerMap,
    Plan,
    auto_plan,
    device_figures,
    knapsack,
    parse_memory,
    seconds_per_value,
)

maps = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0, 10, allow_subnormal=False)), max_size=9
).map(
    lambda rows: [
        InnerMap(str(i), 4096 * size, 10 * size, seconds) for i, (size, seconds) in enumerate(rows)
    ]
)
budgets = st.integers(0, 4096 * 200)


def nbytes(maps, saved):
    return sum(m.nbytes for m in maps if m.name in saved)


def seconds(maps, saved, price=0.0):
    return sum(price * m.nbytes if m.name in saved else m.seconds for m in maps)


def every_plan(maps):
    return chain.from_iterable(combinations(maps, k) for k in range(len(maps) + 1))


@settings(max_examples=200, deadline=None)
@given(maps, budgets, st.sampled_from([0.0, 1e-5, 1e-4]))
def test_no_plan_within_the_budget_is_faster(maps, budget, price):
    saved = knapsack(maps, budget, price)
    assert nbytes(maps, saved) <= budget
    costs = [
        (seconds(maps, {m.name for m in plan}, price), sum(m.nbytes for m in plan))
        for plan in every_plan(maps)
        if sum(m.nbytes for m in plan) <= budget
    ]
    least = min(cost for cost, _ in costs)
    assert seconds(maps, saved, price) == pytest.approx(least)


@settings(max_examples=200, deadline=None)
@given(maps, budgets, budgets)
def test_a_smaller_budget_never_takes_more_bytes_nor_less_time(maps, one, other):
    small, large = (knapsack(maps, budget) for budget in sorted((one, other)))
    assert nbytes(maps, small) <= nbytes(maps, large)
    assert seconds(maps, small) >= seconds(maps, large) - 1e-9


def test_what_costs_nothing_is_not_saved():
    free, dear = InnerMap("free", 100, 0, 0.0), InnerMap("dear", 100, 0, 1.0)
    assert knapsack([free, dear], None) == {"dear"}
    assert knapsack([free, dear], 99) == frozenset()


@settings(max_examples=100, deadline=None)
@given(maps, budgets, st.floats(0, 1e-3), st.integers(0, 10_000))
def test_auto_stays_within_its_budget(maps, budget, price, step_flops):
    saved = auto_plan(maps, budget, price, step_flops)
    assert nbytes(maps, saved) <= budget
    if nbytes(maps, {m.name for m in maps}) <= budget:
        added = sum(m.flops for m in maps if m.name not in saved)
        assert added <= 0.12 * step_flops


def test_sizes_without_a_common_divisor():
    maps = [InnerMap(str(i), 10**9 + 7 * i, 0, 1.0 + i % 3) for i in range(40)]
    saved = knapsack(maps, 20 * 10**9)
    assert 19 <= len(saved) <= 20 and nbytes(maps, saved) <= 20 * 10**9


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", "auto"),
        ("min", "min"),
        (0.3, 0.3),
        (1.0, 1.0),
        ("40%", 0.4),
        ("12.5 %", 0.125),
        (1000, 1000),
        (5000, 5000),
        ("6GiB", 6 * 2**30),
        ("1.5 MB", 1_500_000),
        ("300B", 300),
    ],
)
def test_memory_is_read(given, expected):
    found = parse_memory(given)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("given", "written"), [(1, r"1\.0 or '100%'"), (40, r"0\.4 or '40%'"), (999, "9.99 or '999%'")]
)
def test_a_small_int_is_no_fraction(given, written):
    with pytest.raises(ValueError, match=f"got {given}, an int, .* bytes; write {written} for a"):
        parse_memory(given)


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("name", "memory", "figures"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, H100),
        ("NVIDIA H200", 150e9, H200),
        ("NVIDIA H200 MIG 1g.18gb", 17e9, H200),
        ("NVIDIA GH200 480GB", 102e9, H200),
        ("NVIDIA H100 MIG 1g.10gb", 10e9, H100),
        ("NVIDIA A100-SXM4-80GB", 85e9, H100),
        ("NVIDIA B200", 192e9, H200),
    ],
)
def test_a_gpu_is_known_by_name_and_memory(monkeypatch, name, memory, figures):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(name=name, total_memory=memory)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert device_figures(torch.device("cuda", 1)) is figures
    assert asked == [torch.device("cuda", 1)]


def test_a_gpu_that_is_not_there_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    assert device_figures(torch.device("cuda")) is device_figures(torch.device("meta")) is H100
    assert device_figures(torch.device("cpu")) is CPU


def test_figures_of_recomputing():
    conv, norm, shape = Conv(None, padding=(1, 1)), Norm(), (64, 32, 3, 3)
    flops = 2 * 32 * 9
    assert seconds_per_value(norm, (), 2, H100) == pytest.approx(2 * 2 / 3.0e12)
    assert seconds_per_value(norm, (), 2, H200) == pytest.approx(2 * 2 / 4.3e12)
    for itemsize, rate in {2: 450e12, 4: 225e12, 8: 30e12}.items():
        narrow = max(rate / 2, 10e12)  # 32 of 64 channels
        expected = flops / narrow + 1.5 * itemsize / 3.0e12
        assert seconds_per_value(conv, shape, itemsize, H100) == pytest.approx(expected)
    assert H100.conv_flops(2, 256) == 450e12 and H100.conv_flops(2, 1) == 10e12
    assert CPU.conv_flops(4, 1) == 200e9
    # Plans on a CPU are those of the figures that are measured in docs/performance.md.
    assert seconds_per_value(conv, shape, 4, CPU) == pytest.approx(flops / 360e9 + 1.5 * 4 / 40e9)
    half = 450e9 if torch.cpu._is_avx512_bf16_supported() else 200e9
    assert seconds_per_value(conv, shape, 2, CPU) == pytest.approx(flops / half + 1.5 * 2 / 40e9)
    contiguous = seconds_per_value(conv, shape, 4, CPU, contiguous=True)
    assert contiguous == pytest.approx(flops / 200e9 + 5 * 1.5 * 4 / 40e9)
    assert CPU.price_per_byte == 15 / 40e9 and CPU.launch == 0


def pairs(device):
    modules = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*modules, nn.BatchNorm2d(8)).to(device), torch.ones(
        2, 3, 9, 9, device=device
    )


def test_a_map_takes_a_launch_on_a_gpu():
    model, x = pairs("cpu")
    (graph,) = find(model, (x,), {}, "auto", False).graphs
    assert len(graph.links) == 3
    for link in graph.links:
        more = inner_map(link, H100).seconds - inner_map(link, replace(H100, launch=0.0)).seconds
        assert more == pytest.approx(5e-6)


@pytest.mark.parametrize(("device", "figures"), [("cpu", CPU), ("meta", H100)])
def test_a_model_is_planned_for_its_device(device, figures):
    model, x = pairs(device)
    found = find(model, (x,), {}, 1.0, False)
    (graph,) = found.graphs
    assert graph.device is figures
    assert graph.maps == [inner_map(link, figures) for link in graph.links]


@settings(max_examples=200, deadline=None)
@given(maps, budgets, st.integers(0, 10_000), st.sampled_from([H100, H200]))
def test_auto_on_a_gpu_gives_up_what_it_must(maps, budget, step_flops, device):
    maps = [replace(m, seconds=m.seconds + device.launch) for m in maps]
    plan, least = Plan("auto"), 4096 * 50
    eager = int((budget + least) / 0.53) + 1
    room = int(0.53 * eager) - least
    plan.decide(maps, eager, least, step_flops, device)
    assert nbytes(maps, plan.saved) <= room
    assert all(nbytes(maps, plan.saved) + m.nbytes > room for m in maps if m.name not in plan.saved)
    assert seconds(maps, plan.saved) == pytest.approx(seconds(maps, knapsack(maps, room)))


@settings(max_examples=100, deadline=None)
@given(maps, st.integers(0, 4096 * 400), st.integers(0, 10_000), st.integers(1, 10**7))
def test_auto_on_a_cpu_gives_up_what_is_nearly_free(maps, eager, step_flops, speed):
    maps = [replace(m, seconds=m.seconds / speed) for m in maps]  # about as dear as their bytes
    plan = Plan("auto")
    plan.decide(maps, eager, 4096, step_flops, CPU)
    room = max(int(0.53 * eager) - 4096, 0)
    assert plan.saved == auto_plan(maps, room, 15 / 40e9, step_flops)


@pytest.mark.parametrize("device", [CPU, H100])
def test_what_is_not_known_is_saved_if_it_is_worth_its_bytes(device):
    worth = device.price_per_byte * 4096
    maps = [InnerMap("dear", 4096, 0, 1.1 * worth), InnerMap("cheap", 4096, 0, 0.9 * worth)]
    assert Plan("auto").of(maps, device) == {"dear"}


# -------------------------------------------------------------------------------------- calibration


def test_a_gpu_is_timed_by_its_own_events(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.at = len(done)

        def synchronize(self):
            done.append("waited")

        def elapsed_time(self, end):  # milliseconds: the first two runs are slow
            return sum(100.0 if i < 2 else 3.0 for i in range(self.at, end.at))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(calibration, "time", None)
    seconds = calibration._median(lambda: done.append("ran"), torch.device("cuda", 1))
    assert seconds == pytest.approx(3e-3)
    assert done.count("waited") == 4 and done[-1] == "waited"


def test_a_cpu_is_timed_by_the_clock(monkeypatch):
    clock = iter([0, 100, 100, 101, 200, 203, 300, 302])
    monkeypatch.setattr(torch.cuda, "Event", None)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(clock))
    assert calibration._median(lambda: None, torch.device("cpu")) == 2
