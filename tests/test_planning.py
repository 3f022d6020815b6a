"""The plan under a budget: exact, within it, and monotonic."""

from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedconvbn.fusion.plan import InnerMap, auto_plan, knapsack, parse_memory

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
        (1, 1.0),
        (5000, 5000),
        ("6GiB", 6 * 2**30),
        ("1.5 MB", 1_500_000),
        ("300B", 300),
    ],
)
def test_memory_is_read(given, expected):
    assert parse_memory(given) == expected
