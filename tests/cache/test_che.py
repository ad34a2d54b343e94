"""Che's approximation and the simulator agree where tokens choose experts independently, and not where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_cache.che import che_hit_rate
from gpu_cache.geometry import Geometry
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import Calls


def drawn_calls(layers: int, experts: int, steps: int, repeats: int = 1) -> Calls:
    """Every step calls each expert of a layer with a chance of its own, or none of them; each draw is used so often."""
    random = np.random.default_rng(1)
    chance = random.permuted(np.tile(0.6 / (1 + np.arange(experts)) ** 0.8, (layers, 1)), axis=1)
    called = np.repeat(random.random((steps // repeats, layers, experts)) < chance, repeats, axis=0)
    step, layer, expert = np.nonzero(called)
    start = np.flatnonzero(np.diff(step * layers + layer, prepend=-1))
    ends = np.append(start, len(step))
    score = np.ones(len(expert), np.float32)
    return Calls(step[start], np.zeros_like(start), layer[start], ends, expert, score, layers, experts)


@pytest.mark.parametrize(("nblocks", "nways"), [(3, 8), (3, 16), (1, 40), (2, 30)])
def test_it_agrees_with_lru_on_independent_calls(nblocks: int, nways: int) -> None:
    calls = drawn_calls(layers=3, experts=32, steps=2000)
    expected = che_hit_rate(calls, Geometry(nblocks, nways, 3, 32))
    assert replay(calls, Setting(nblocks, nways)).hit_rate == pytest.approx(expected, abs=0.02)
    assert 0.3 < expected < 0.95


def test_calls_that_follow_each_other_hit_more_than_it_says() -> None:
    calls = drawn_calls(layers=3, experts=32, steps=2000, repeats=4)
    assert replay(calls, Setting(3, 8)).hit_rate > 0.1 + che_hit_rate(calls, Geometry(3, 8, 3, 32))


def test_with_room_for_all_every_expert_is_there() -> None:
    calls = drawn_calls(layers=2, experts=8, steps=50)
    assert che_hit_rate(calls, Geometry(2, 8, 2, 8)) == 1.0
