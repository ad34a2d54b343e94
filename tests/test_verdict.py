"""The verdict is a sum that can be made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hybrid.engine.experts.verdict import CallCosts, Observed, judge, most_called

COSTS = CallCosts(cpu=100e-6, device=10e-6, start=5e-6, copy=200e-6, cpu_row=20e-6, device_row=1e-6)
SEEN = Observed(
    steps=7,
    calls=np.array([8.0, 8.0]),
    hits=np.array([6.0, 0.0]),
    fills=1.0,
    static=np.array([4.0, 4.0]),
    bookkeeping=20e-6,
)


def test_costs_by_hand() -> None:
    """CPU: 16 calls of 100 us. Static: 4 on the CPU in each layer. Cache: 2, then 8, and a copy charged as a call."""
    verdict = judge(SEEN, COSTS)
    assert verdict.cpu_ms == pytest.approx(1.6)
    assert verdict.static_ms == pytest.approx(0.4 + 0.4 + 0.02)
    assert verdict.cache_ms == pytest.approx(0.2 + 0.8 + 0.02 + 0.1)
    assert (verdict.best, verdict.steps) == ("static", 7)
    assert "fixed slots hit 50%, the cache 38% for 1.0 copies a step" in str(verdict)


def test_a_slow_device_is_what_a_layer_waits_for() -> None:
    verdict = judge(SEEN, replace(COSTS, device=400e-6))
    assert verdict.static_ms == pytest.approx(2 * (4 * 0.4 + 0.005) + 0.02)
    assert verdict.best == "cpu" and "too little to pay" in verdict.why


def test_a_cache_that_hits_wins() -> None:
    verdict = judge(replace(SEEN, hits=np.array([7.0, 7.0]), fills=0.5), COSTS)
    assert verdict.best == "cache" and verdict.cache_ms == pytest.approx(0.1 + 0.1 + 0.02 + 0.05)


def test_every_index_keeps_what_was_asked_for_most() -> None:
    asked = np.array([5, 9, 0, 7, 7, 1, 3, 3])
    index_of = np.array([0, 0, 0, 0, 1, 1, -1, 1])
    assert most_called(asked, index_of, 2) == [1, 3, 4, 7]
    assert most_called(asked, index_of, 8) == [0, 1, 3, 4, 5, 7]  # never asked, or nowhere to lie: left out
    assert most_called(asked, index_of, 1) == [1, 4]
