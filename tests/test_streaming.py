"""When a layer is streamed to the device, by sums that can be made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid.engine.experts.costs import CallCosts
from hybrid.engine.experts.streaming import streaming_pays

COSTS = CallCosts(cpu=10.0, device=1.0, start=2.0, copy=20.0, cpu_row=4.0, device_row=0.25)


@pytest.mark.parametrize(("rows", "pays"), [(7, True), (6, False), (1, False)])
def test_many_rows_pay_for_the_link(rows: int, pays: bool) -> None:
    """Three experts: 12 a row on the threads, but at least 30; 60 over the link, and 20 until the first is there."""
    assert streaming_pays([], [rows] * 3, 0, COSTS) == pays


def test_a_device_that_multiplies_slowly_is_not_worth_it() -> None:
    """228 on the threads; 3 * (76 + 2) and 20 on the device."""
    assert not streaming_pays([], [19] * 3, 0, replace(COSTS, device_row=4.0))
    assert streaming_pays([], [19] * 3, 0, COSTS)


def test_copies_that_were_asked_for_come_first() -> None:
    assert streaming_pays([], [7] * 3, 0, COSTS) and not streaming_pays([], [7] * 3, 1, COSTS)  # 84; 80, 100


def test_what_the_device_holds_is_computed_beside_either() -> None:
    """Left to the threads, 84; the device takes 2 + 60 for what it holds, 3 * (1.75 + 2) for the rest, and 20 more."""
    assert not streaming_pays([240], [7] * 3, 0, COSTS)
    assert streaming_pays([200], [7] * 3, 0, COSTS)
