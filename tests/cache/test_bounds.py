"""Bounds equal what exhaustive search finds, or lie above it."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import random_trace

from gpu_cache import bounds
from gpu_cache.bounds import belady, bypass_belady, next_ranks, static_best, static_layers
from gpu_cache.geometry import Geometry
from gpu_cache.quota_bound import quota_bound
from gpu_cache.trace import Calls, calls

Group = tuple[int, tuple[int, ...]]  # step, keys


def best_schedule(groups: list[Group], ways: int, quota: int | None, every_miss: bool) -> int:
    """Most hits of one index by trying everything: which misses are admitted, which unpinned experts leave."""

    @lru_cache(None)
    def best(at: int, content: frozenset[int], left: int) -> int:
        if at == len(groups):
            return 0
        step, keys = groups[at]
        if quota is not None and (at == 0 or groups[at - 1][0] != step):
            left = quota
        hits, misses = content & set(keys), [key for key in keys if key not in content]
        others, free = content - hits, ways - len(content)
        most = min(len(misses), free + len(others), left)
        choices = combinations(misses, most) if every_miss else subsets(misses, most)
        found = 0
        for fills in choices:
            for gone in combinations(sorted(others), max(0, len(fills) - free)):
                found = max(found, best(at + 1, (content - set(gone)) | set(fills), left - len(fills)))
        return len(hits) + found

    return best(0, frozenset(), 99)


def subsets(items: list[int], most: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(most + 1) for chosen in combinations(items, size)]


def one_layer(groups: list[tuple[int, ...]], experts: int, per_step: int = 1) -> Calls:
    """Groups of one layer. Several groups of a step stand for layers that share an index: the bounds do not care."""
    start = np.cumsum([0, *map(len, groups)])
    expert = np.array([key for group in groups for key in group], np.int64)
    step = np.arange(len(groups)) // per_step
    return Calls(
        step, np.zeros_like(step), np.zeros_like(step), start, expert, np.ones(len(expert), np.float32), 1, experts
    )


keys = st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True).map(tuple)
small = st.lists(keys, min_size=1, max_size=8)


@settings(max_examples=400)
@given(small, st.integers(1, 3))
def test_bypass_belady_is_the_best_there_is(groups: list[tuple[int, ...]], ways: int) -> None:
    wanted = best_schedule(list(enumerate(groups)), ways, None, every_miss=False)
    assert bypass_belady(one_layer(groups, 5), Geometry(1, ways, 1, 5)).hits.sum() == wanted


@settings(max_examples=300)
@given(small, st.integers(1, 3))
def test_belady_is_the_best_that_admits_every_miss(groups: list[tuple[int, ...]], ways: int) -> None:
    groups = [group[:ways] for group in groups]
    wanted = best_schedule(list(enumerate(groups)), ways, None, every_miss=True)
    assert belady(one_layer(groups, 5), Geometry(1, ways, 1, 5)).hits.sum() == wanted


def test_next_uses_alone_are_not_enough() -> None:
    """Experts 0 and 1 are next asked for together; only 0 is wanted soon after that, while its slot is pinned."""
    groups = [(0, 1), (0, 1), (0,), (1,)]
    assert bypass_belady(one_layer(groups, 2), Geometry(1, 1, 1, 2)).hits.tolist() == [2]


@settings(max_examples=200)
@given(small, st.integers(1, 3), st.integers(0, 2), st.integers(1, 3))
def test_the_bound_with_a_quota_is_above_the_best_there_is(groups, ways: int, quota: int, per_step: int) -> None:
    numbered = [(at // per_step, group) for at, group in enumerate(groups)]
    wanted = best_schedule(numbered, ways, quota, every_miss=False)
    trace, geometry = one_layer(groups, 5, per_step), Geometry(1, ways, 1, 5)
    assert bypass_belady(trace, geometry, quota).hits.sum() <= wanted <= quota_bound(trace, geometry, quota)


def test_a_quota_lowers_the_bound() -> None:
    trace, geometry = calls(random_trace(1, steps=200, layers=4, experts=16, top_k=4)), Geometry(4, 8, 4, 16)
    free = bypass_belady(trace, geometry).hits.sum()
    bounds = [quota_bound(trace, geometry, quota) for quota in (0, 1, 2, 16)]
    assert bounds[0] == 0 < bounds[1] < bounds[2] < free == bounds[3]


def static_by_loops(trace: Calls, geometry: Geometry) -> int:
    counts = np.bincount(trace.key, minlength=trace.layers * trace.experts)
    indexes = [[counts[k] for k in range(len(counts)) if geometry.index_of(k) == i] for i in range(geometry.nblocks)]
    return sum(sum(sorted(counts, reverse=True)[: geometry.nways]) for counts in indexes)


@pytest.mark.parametrize("mapping", ["modulo", "prefix", "hash"])
def test_static_best_is_the_sum_of_the_largest_counts(mapping: str) -> None:
    trace, geometry = calls(random_trace(3, layers=4)), Geometry(3, 5, 4, 8, mapping)
    schedule = static_best(trace, geometry)
    assert schedule.hits.sum() == static_by_loops(trace, geometry) and not schedule.fills.any()
    assert schedule.found.sum() == schedule.hits.sum()


def test_static_layers_hold_whole_layers() -> None:
    trace = calls(random_trace(3, layers=4))
    assert static_layers(trace, Geometry(3, 5, 4, 8)).hits.tolist() == [80, 0, 0, 0]


@pytest.mark.parametrize("mapping", ["modulo", "prefix", "hash"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_schedules_add_up(mapping: str, tokens: int) -> None:
    trace = calls(random_trace(5, steps=60, layers=4, tokens=tokens))
    for bound in (belady, bypass_belady):
        schedule = bound(trace, Geometry(3, 4, 4, 8, mapping))
        assert schedule.found.sum() == schedule.hits.sum() and (schedule.found <= trace.sizes).all()
        held = schedule.fills.sum() - schedule.evictions.sum()
        assert 0 < held <= 12 and (schedule.hits[3] == 0) == (mapping == "prefix")


def test_a_long_trace_keeps_its_heaps_short() -> None:
    """The same experts hit again and again: what they leave behind in the heaps is cleared away."""
    trace = one_layer([(0, 1, 2), (1, 2, 3)] * 2000, 5)
    assert belady(trace, Geometry(1, 4, 1, 5)).hits.sum() == trace.total - 4


def libcachesim_hits(keys: list[int], ways: int) -> int:
    oracle = pytest.importorskip("libcachesim", reason="libcachesim is not installed; it is GPL and optional")
    following: dict[int, int] = {}
    nexts = []
    for at, key in reversed(list(enumerate(keys))):
        nexts.append(following.get(key, 1 << 62))
        following[key] = at
    cache, hits = oracle.Belady(cache_size=ways), 0
    for at, (key, following_at) in enumerate(zip(keys, reversed(nexts), strict=True)):
        request = oracle.Request()
        request.obj_id, request.obj_size, request.clock_time, request.next_access_vtime = key + 1, 1, at, following_at
        hits += cache.get(request)
    return hits


@pytest.mark.parametrize("ways", [2, 5, 13, 30])
@pytest.mark.parametrize("sticky", [0.0, 0.6])
def test_belady_without_sets_and_groups_equals_libcachesim(ways: int, sticky: float) -> None:
    trace = calls(random_trace(7, steps=2000, layers=2, experts=20, top_k=1, sticky=sticky))
    hits = belady(trace, Geometry(1, ways, 2, 20)).hits.sum()
    assert hits == libcachesim_hits(trace.key.tolist(), ways)


def test_caches_of_one_trace_share_what_is_known_of_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(bounds, "next_ranks", lambda calls: made.append(1) or next_ranks(calls))
    trace = calls(random_trace(7, layers=2))
    for ways in (2, 4):
        belady(trace, Geometry(2, ways, 2, 8))
        bypass_belady(trace, Geometry(2, ways, 2, 8))
    assert len(made) == 1
