"""Confidence intervals of hit rates: they hold the true rate as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from routing import random_trace

from gpu_cache.intervals import MIN_SEQUENCES, RUNS, blocks_of, interval, sums_of
from gpu_cache.simulator import Setting, replay
from gpu_cache.trace import Calls, calls, make_trace

TRUE = 0.6


def covered(draw, true: float, times: int = 400) -> float:
    """How often the interval of blocks that `draw(random)` makes has the true rate."""
    random = np.random.default_rng(1)
    found = [interval(*draw(random), seed=i, resamples=399) for i in range(times)]
    return float(np.mean([low <= true <= high for low, high in found]))


def alike(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of one kind, all as long."""
    total = np.full(24, 500)
    return random.binomial(total, TRUE), total


def of_topics(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sequences that differ: as if all calls were independent, an interval would be far too short."""
    total = random.integers(100, 1000, 40)
    return random.binomial(total, random.beta(6, 4, 40)), total


@pytest.mark.parametrize("draw", [alike, of_topics])
def test_95_of_100_intervals_have_the_true_rate(draw) -> None:
    assert 0.93 <= covered(draw, TRUE) <= 0.97


def test_intervals_of_a_difference_have_it_too() -> None:
    """Two caches on the same sequences: what a sequence does to both cancels."""

    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        total, rate = np.full(40, 500), random.beta(6, 4, 40) * 0.9
        one, other = random.binomial(total, rate + 0.05), random.binomial(total, rate)
        return one - other, total

    assert 0.93 <= covered(draw, 0.05) <= 0.97
    low, high = interval(*draw(np.random.default_rng(0)))
    assert 0 < low < 0.05 < high < 0.1


def independent(steps: int, seed: int) -> Calls:
    """Every token of one layer asks for one expert, drawn from the same table."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 17)
    expert = random.choice(16, steps, p=weights / weights.sum())
    step, none = np.arange(steps), np.zeros(steps, np.int64)
    columns = {"step": step, "sequence": none, "position": step, "layer": none, "rank": none, "expert": expert}
    return calls(make_trace({**columns, "score": np.ones(steps)}, 1, 16))


def test_replays_of_one_process_have_its_rate_in_their_intervals() -> None:
    true = replay(independent(200_000, 999), Setting(1, 6)).hit_rate
    held = []
    for seed in range(100):
        trace = independent(1200, seed)
        result, blocks = replay(trace, Setting(1, 6)), blocks_of(trace)
        low, high = interval(sums_of(blocks, result.found), sums_of(blocks, result.groups))
        held.append(low <= true <= high)
    assert 90 <= sum(held) <= 99  # of 100; cold starts cost a little, and 95 have a standard deviation of 2.2


def test_blocks_are_sequences_or_runs_of_steps() -> None:
    def trace(sequences: np.ndarray) -> Calls:
        step, none = np.arange(len(sequences)), np.zeros(len(sequences), np.int64)
        columns = {"step": step, "sequence": sequences, "position": step, "layer": none, "rank": none, "expert": none}
        return calls(make_trace({**columns, "score": np.ones(len(sequences))}))

    many = np.repeat(np.arange(MIN_SEQUENCES), 5)
    assert np.array_equal(blocks_of(trace(many)), many)
    few = blocks_of(trace(np.repeat(np.arange(3), 32)))
    assert np.array_equal(np.bincount(few), np.full(RUNS, 4)) and (np.diff(few) >= 0).all()
    assert np.array_equal(blocks_of(trace(np.zeros(5, np.int64))), np.arange(5))


def test_layers_of_a_step_are_of_one_block() -> None:
    trace = calls(random_trace(3, steps=50, layers=4, experts=8, top_k=2))
    blocks = blocks_of(trace)
    assert all(len(set(blocks[trace.step == step].tolist())) == 1 for step in range(50))
    assert sums_of(blocks, trace.sizes).sum() == trace.total


def test_what_does_not_vary_has_no_width_and_one_block_none_at_all() -> None:
    assert interval(np.full(9, 30), np.full(9, 60)) == (0.5, 0.5)
    assert interval(np.array([3]), np.array([6])) is None
    assert interval(np.zeros(4, np.int64), np.full(4, 7)) == (0.0, 0.0)
