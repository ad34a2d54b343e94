"""Which misses are copied, worked out by hand."""

from __future__ import annotations

import pytest

from gpu_cache.admission import ADMISSIONS, HALF_LIFE, WINDOW, BreakEven, Costs, make_admission
from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.table import Table

GEOMETRY = Geometry(1, 2, 1, 4)


def admitted(table: Table, step: int, experts: list[int]) -> list[int]:
    """What is copied of the misses of a step; copies end at once."""
    table.begin_step(step)
    table.lookup(0, experts)
    fills = table.admit()
    table.release()
    for fill in fills:
        table.publish(fill.slot)
    return [fill.key for fill in fills]


def idle(table: Table, steps: int) -> None:
    for _ in range(steps):
        table.begin_step(0)


def test_always() -> None:
    assert admitted(Table(GEOMETRY), 0, [3, 1]) == [3, 1]


def test_second_touch_waits_for_the_second_miss() -> None:
    table = Table(GEOMETRY, admission="second-touch")
    assert admitted(table, 0, [3, 1]) == []
    assert admitted(table, 1, [3, 2]) == [3]
    assert admitted(table, 2, [3, 2]) == [2]


@pytest.mark.parametrize(("pause", "copied"), [(WINDOW, [3]), (WINDOW + 1, [])])
def test_second_touch_forgets(pause: int, copied: list[int]) -> None:
    table = Table(GEOMETRY, admission="second-touch")
    admitted(table, 0, [3])
    idle(table, pause - 1)
    assert admitted(table, 0, [3]) == copied


def test_second_touch_remembers_misses_that_the_quota_turned_away() -> None:
    table = Table(GEOMETRY, admission="second-touch", quota=1)
    admitted(table, 0, [0, 1])
    assert admitted(table, 1, [0, 1]) == [0]
    assert admitted(table, 2, [1]) == [1]


def test_break_even_copies_when_calls_so_far_pay() -> None:
    # A copy costs 3, a call on the device saves 2: more than 1.5 calls are needed.
    table = Table(GEOMETRY, admission="break-even", costs=Costs(copy=3, cpu=2.5, device=0.5))
    assert table.admission.reuse == 1.5  # type: ignore[attr-defined]
    assert admitted(table, 0, [0]) == []  # nothing is known of it
    assert admitted(table, 1, [0]) == []  # one call before, worth a little less than 1
    assert admitted(table, 2, [0]) == [0]  # two, worth a little less than 2


def test_break_even_counts_a_call_half_after_a_half_life() -> None:
    rule = BreakEven(GEOMETRY, Costs(3, 2.5, 0.5))
    rule.on_call([0])
    for _ in range(HALF_LIFE):
        rule.on_step()
    rule.on_call([0])
    assert rule.expected_reuse(0, 0) == pytest.approx(0.5)
    for _ in range(HALF_LIFE):
        rule.on_step()
    rule.on_call([0, 1])
    assert rule.expected_reuse(0, 0) == pytest.approx(0.25 + 0.5)
    assert rule.expected_reuse(0, 1) == pytest.approx(0)


def test_break_even_expects_less_where_experts_do_not_stay() -> None:
    rule = BreakEven(GEOMETRY, Costs(3, 2.5, 0.5))
    for _ in range(5):
        rule.on_call([0])  # four calls before this one
    assert rule.expected_reuse(0, 0) == pytest.approx(4)
    for fills, expected in ((2, 4), (3, 4 * 2 / 3), (8, 1)):  # two ways
        rule = BreakEven(GEOMETRY, Costs(3, 2.5, 0.5))
        for _ in range(5):
            rule.on_call([0])
        for _ in range(fills):
            rule.on_fill(0)
        assert rule.expected_reuse(0, 0) == pytest.approx(expected)
        assert rule.wants(0, 0) == (expected > 1.5)


def test_break_even_counts_hits_too() -> None:
    table = Table(GEOMETRY, admission="break-even", costs=Costs(3, 2.5, 0.5))
    table.preload([0])
    for step in range(4):
        admitted(table, step, [0])
    assert table.admission.expected_reuse(0, 0) == pytest.approx(  # type: ignore[attr-defined]
        sum(0.5 ** (age / HALF_LIFE) for age in (1, 2, 3)) * 1
    )


def test_break_even_never_copies_to_a_device_that_saves_nothing() -> None:
    table = Table(GEOMETRY, admission="break-even", costs=Costs(copy=0, cpu=1, device=1))
    assert [admitted(table, step, [0]) for step in range(50)] == [[]] * 50


def test_break_even_is_the_same_after_its_weights_are_scaled_down() -> None:
    rule = BreakEven(GEOMETRY, Costs(3, 2.5, 0.5))
    before = rule._weight
    for _ in range(520 * HALF_LIFE):
        rule.on_step()
    assert rule._weight < 2.0**512 and rule._weight != before
    for _ in range(3):
        rule.on_call([0])
    for _ in range(4):
        rule.on_fill(0)
    assert rule.expected_reuse(0, 0) == pytest.approx(2 * 2 / 4)


def test_names() -> None:
    assert tuple(ADMISSIONS) == ("always", "second-touch", "break-even")
    with pytest.raises(CacheError, match="admission 'maybe' is unknown: use one of always, second-touch, break-even"):
        make_admission("maybe", GEOMETRY)
    with pytest.raises(CacheError, match="needs costs: seconds to copy an expert"):
        make_admission("break-even", GEOMETRY)
