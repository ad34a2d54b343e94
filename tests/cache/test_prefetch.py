"""Rules that name experts before they are called: what they learn, what their copies become, what bounds them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from routing import random_trace

from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.prefetch import LEARNT, PREFETCHES, REPLAYED, Frequency, NextGate, Transition, known_prefetch
from gpu_cache.quota_bound import prefetch_bound
from gpu_cache.simulator import Setting, replay
from gpu_cache.sweep import sweep
from gpu_cache.trace import Calls, calls, make_trace

LAYERS, EXPERTS, TOP_K = 3, 8, 2
ROWS = random_trace(5, steps=60, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, sticky=0.7)
NAMED = np.random.default_rng(3).integers(-1, EXPERTS, len(ROWS))  # what routers might have said early
TRACE = calls(replace(ROWS, next_expert=NAMED))
GEOMETRY = Geometry(3, 4, LAYERS, EXPERTS)


def first(values: dict[int, float], count: int) -> list[int]:
    return sorted((e for e in values if values[e] > 0), key=lambda e: (-values[e], e))[:count]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_frequency_names_what_was_called_most(depth: int) -> None:
    rule, counts = Frequency(GEOMETRY, depth), [Counter[int]() for _ in range(LAYERS)]
    for _, layer, experts, _ in TRACE:
        counts[layer].update(experts)
        assert list(rule.follow(layer, experts)) == first(counts[(layer + depth) % LAYERS], TOP_K)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_transition_names_what_followed_most_often(depth: int) -> None:
    rule, groups = Transition(GEOMETRY, depth), list(TRACE)
    for at, (_, layer, experts, _) in enumerate(groups):
        shares: dict[int, float] = Counter()
        pairs = [(a[2], b[2]) for a, b in zip(groups, groups[depth : at + 1], strict=False) if a[1] == layer]
        for expert in experts:
            followed = [after for before, after in pairs if expert in before]
            for after in followed:
                for following in after:
                    shares[following] += 1 / len(followed)
        named = list(rule.follow(layer, experts))
        assert len(named) == min(TOP_K, len(shares))
        least = min((shares[expert] for expert in named), default=0)  # of equal shares rounding decides
        assert all(shares[other] <= least + 1e-9 for other in shares if other not in named)


def test_transition_learns_nothing_across_gaps() -> None:
    rule = Transition(GEOMETRY)
    assert [list(rule.follow(layer, [1])) for layer in (0, 2, 1)] == [[], [], []]  # 2 does not follow 0, nor 1 2
    assert [list(rule.follow(layer, [3])) for layer in (0, 1, 2)] == [[], [], []]
    assert list(rule.follow(0, [3, 1])) == [3]  # 3 was followed by 3, of 1 nothing is known


@pytest.mark.parametrize("delay", [0, 2])
def test_a_replay_counts_what_was_copied_ahead_and_used(delay: int) -> None:
    for rule in LEARNT:
        result = replay(TRACE, Setting(3, 3, delay=delay, prefetch=rule))
        assert 0 < result.used < result.prefetched < result.fills.sum()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_perfect_rule_misses_what_nothing_came_before(depth: int) -> None:
    """With room for all, and copies that come in time exactly because the rule looks so far ahead."""
    result = replay(TRACE, Setting(3, EXPERTS, delay=depth - 1, prefetch=f"perfect:{depth}"))
    assert result.hits.sum() >= TRACE.total - TRACE.sizes[:depth].sum()
    assert result.used <= result.prefetched
    if depth > 1:
        late = replay(TRACE, Setting(3, 3, delay=depth - 1, prefetch="perfect"))
        early = replay(TRACE, Setting(3, 3, delay=depth - 1, prefetch=f"perfect:{depth}"))
        assert early.hits.sum() > late.hits.sum()


def test_what_is_copied_ahead_for_nothing_is_not_used() -> None:
    """Layer 1 calls every expert once: those that were called are never the next one."""
    steps = 24
    step, layer = np.divmod(np.arange(2 * steps), 2)
    columns = {"step": step, "sequence": 0 * step, "position": step, "layer": layer, "rank": 0 * step}
    trace = calls(make_trace({**columns, "expert": step * layer, "score": np.ones(2 * steps)}, 2, steps))
    result = replay(trace, Setting(2, 1, prefetch="frequency"))
    assert result.prefetched > 0 and (result.used, result.hits[1]) == (0, 0)


def tiny(seed: int) -> Calls:
    return calls(random_trace(seed, steps=5, layers=2, experts=3, top_k=1))


@pytest.mark.parametrize("seed", range(8))
def test_kept_calls_are_as_many_as_can_be(seed: int) -> None:
    """By trying every choice: with no copies the bound is the kept ones alone."""
    trace, geometry = tiny(seed), Geometry(1, 2, 2, 3)
    keys = trace.key.tolist()
    intervals = []
    for at, key in enumerate(keys):
        after = next((later for later in range(at + 1, len(keys)) if keys[later] == key), None)
        intervals += [] if after is None else [range(at, after)]
    most = 0
    for size in range(len(intervals) + 1):
        for chosen in combinations(intervals, size):
            if all(count <= 2 for count in Counter(gap for kept in chosen for gap in kept).values()):
                most = size
    assert prefetch_bound(trace, geometry, 0) == most


@pytest.mark.parametrize("quota", [0, 1, 3, None])
@pytest.mark.parametrize("prefetch", REPLAYED)
def test_nothing_exceeds_the_bound(prefetch: str, quota: int | None) -> None:
    for policy in ("LRU", "ClassLRU", "random"):
        result = replay(TRACE, Setting(3, 3, policy, quota=quota, prefetch=prefetch))
        assert (result.calls == result.hits + result.loading + result.misses).all()
        bound = prefetch_bound(TRACE, Geometry(3, 3, LAYERS, EXPERTS), quota)
        assert result.hits.sum() <= bound and (quota is None or quota > 0 or result.hits.sum() == 0)
        assert result.upper_bound == (None if prefetch == "none" else bound)
    assert prefetch_bound(TRACE, Geometry(3, 3, LAYERS, EXPERTS), 1) < TRACE.total


def test_names_are_known_or_refused_in_a_line() -> None:
    assert replay(TRACE, Setting(3, 3, prefetch="Transition")).prefetched > 0
    assert "next-gate" in PREFETCHES
    with pytest.raises(CacheError, match="this trace does not hold what routers say one layer early"):
        replay(calls(ROWS), Setting(3, 3, prefetch="next-gate"))
    assert known_prefetch("Transition:03") == "transition:3"
    for name, text in (
        ("oracle", "use one of none, frequency"),
        ("none:2", "in no way that there is"),
        ("transition:0", "1 to 64 lookups"),
        ("perfect:99999999999", "1 to 64 lookups"),
        ("frequency:two", "1 to 64 lookups"),
    ):
        with pytest.raises(CacheError, match=text):
            Setting(3, 3, prefetch=name).check(TRACE)
    with pytest.raises(CacheError, match="copies on a miss only"):
        Setting(3, 3, "Belady", prefetch="frequency").check(TRACE)


def test_next_gate_names_what_the_rows_say_in_their_order() -> None:
    steps = [0] * 4 + [1] * 2  # two tokens at layer 0 of two, then one at each layer
    columns = {"step": steps, "sequence": [0] * 6, "position": [0, 0, 1, 1, 2, 2], "layer": [0] * 5 + [1]}
    columns |= {"rank": [0, 1, 0, 1, 0, 0], "expert": [0] * 6, "score": [1] * 6, "next_expert": [3, 1, 3, 2, -1, 2]}
    trace = calls(make_trace(columns))
    assert trace.experts == 4
    rule = NextGate(Geometry(1, 1, 2, 4), iter(trace.named))
    assert [list(rule.follow(layer, [0])) for layer in (0, 0, 1)] == [[3, 1, 2], [], []]
    for wrong in (-2, 1 << 13):
        with pytest.raises(CacheError, match="row 6 has the unknown next_expert"):
            make_trace({**columns, "next_expert": [0] * 5 + [wrong]})


def test_what_names_nothing_before_the_last_layer_is_not_replayed() -> None:
    for named in (np.full(len(ROWS), -1), np.where(ROWS.layer + 1 < LAYERS, -1, NAMED)):
        with pytest.raises(CacheError, match="does not hold what routers say one layer early"):
            Setting(3, 3, prefetch="next-gate").check(calls(replace(ROWS, next_expert=named)))


def test_the_share_that_was_named_counts_groups_before_the_last_layer() -> None:
    some = np.where((ROWS.step < 15) & (ROWS.layer + 1 < LAYERS), ROWS.expert, -1)
    assert calls(replace(ROWS, next_expert=some)).named_share == 0.25  # 15 of 60 steps
    assert calls(replace(ROWS, next_expert=ROWS.expert)).named_share == 1 and calls(ROWS).named_share == 0
    one = random_trace(1, steps=3, layers=1)  # has no layer before the last
    assert calls(replace(one, next_expert=np.full(len(one), -1))).named_share == 1


def test_processes_of_a_sweep_know_what_was_named() -> None:
    settings = [Setting(3, ways, prefetch="next-gate") for ways in (3, 4)]
    assert sweep(TRACE, settings, workers=2) == sweep(TRACE, settings)
    assert calls(ROWS).digest() != TRACE.digest() != calls(replace(ROWS, next_expert=NAMED[::-1])).digest()
