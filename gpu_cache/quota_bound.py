"""A bound on hits when only so many copies may be made in a step."""

from __future__ import annotations

import math
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpu_cache.bounds import bypass_belady, next_ranks
from gpu_cache.geometry import NOWHERE, Geometry
from gpu_cache.trace import Calls, Ints

_WORK = 40_000_000  # intervals times iterations: some seconds; a long trace gets a less sharp bound
_ITERATIONS = 400
_PATIENCE = 12  # iterations without a better bound before steps are halved

Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]


def quota_bound(calls: Calls, geometry: Geometry, quota: int) -> int:
    """Hits that no policy and no admission exceed with `quota` copies a step, from an empty cache.

    The Lagrangian dual of a linear program (`docs/cache_bounds.md`) made smaller by subgradient steps. Its value at any
    prices is a bound, so stopping early costs sharpness, never truth.
    """
    if quota == 0:
        return 0
    free, reached = (int(bypass_belady(calls, geometry, limit).hits.sum()) for limit in (None, quota))
    intervals = _Intervals(calls, geometry)
    if reached == free or not intervals.size:
        return free
    iterations = min(_ITERATIONS, _WORK // intervals.size)
    return min(free, _descend(intervals, geometry.nways, quota, reached, iterations))


def prefetch_bound(calls: Calls, geometry: Geometry, quota: int | None) -> int:
    """Hits that no cache exceeds which may copy an expert at any time, called or not, `quota` of them a step.

    A hit is either of an expert that was there since its call before, and an index holds so many of them at a time, or
    of one that was copied since then: a copy makes one such hit at most.
    """
    if quota is None:
        return calls.total
    return min(calls.total, _kept(calls, geometry) + quota * calls.steps)


def _kept(calls: Calls, geometry: Geometry) -> int:
    """The most calls whose expert was in a slot since its call before: where an index has too many, the one that is
    called last again is given up, which is best for intervals.
    """
    ranks, total = next_ranks(calls), calls.total
    index_of, start, keys = geometry.indexes().tolist(), calls.start.tolist(), calls.key.tolist()
    held: list[set[int]] = [set() for _ in range(geometry.nblocks)]  # ranks of the next calls of kept experts
    furthest: list[list[int]] = [[] for _ in held]  # the same as heaps, with some that are gone
    kept = 0
    for begin, end in pairwise(start):
        touched = set()
        order = sorted(range(begin, end), key=ranks.__getitem__)
        for rank, call in enumerate(order, begin):
            index = index_of[keys[call]]
            if index == NOWHERE:
                continue
            if rank in held[index]:
                held[index].remove(rank)
                kept += 1
            if ranks[call] < total:
                held[index].add(ranks[call])
                heappush(furthest[index], -ranks[call])
                touched.add(index)
        for index in touched:
            while len(held[index]) > geometry.nways:
                held[index].discard(-heappop(furthest[index]))
    return kept


def _descend(intervals: _Intervals, ways: int, quota: int, target: int, iterations: int) -> int:
    """Polyak's steps towards a number of hits that can be had."""
    slot, copy = np.zeros(intervals.gaps), np.zeros(intervals.steps)
    best, scale, since = float(intervals.size), 1.0, 0
    for _ in range(iterations):
        gain, held, copies = intervals.best_reply(slot, copy)
        value = gain + ways * slot.sum() + quota * copy.sum()
        since = 0 if value < best else since + 1
        best = min(best, value)
        if since == _PATIENCE:
            scale, since = scale / 2, 0
        slopes = (ways - held, quota - copies)
        norm = sum(float(slope @ slope) for slope in slopes)
        if norm == 0 or best < target + 1:
            break
        length = scale * (value - target) / norm
        for price, slope in zip((slot, copy), slopes, strict=True):
            np.maximum(price - length * slope, 0, out=price)
    return math.floor(best + 1e-6)


class _Intervals:
    """The time between two calls of an expert. One that is kept through is a hit; it takes a slot in every gap between
    groups of its index, and a copy in the step where it begins, unless the expert's interval before it was kept too.

    They are stored by rounds: the first interval of every expert, then the second ones, experts with most intervals
    first.
    """

    def __init__(self, calls: Calls, geometry: Geometry) -> None:
        index = geometry.indexes()
        group = np.repeat(np.arange(len(calls)), np.diff(calls.start))
        cached = np.flatnonzero(index[calls.key] >= 0)
        key, group = calls.key[cached], group[cached]
        _, gap = np.unique(index[key] * len(calls) + group, return_inverse=True)
        order = np.argsort(key, kind="stable")
        again = np.flatnonzero(key[order][1:] == key[order][:-1])
        again = again[self._by_rounds(key[order][again])]
        self.size = len(again)
        self.gaps = int(gap.max(initial=0)) + 1
        step = np.cumsum(np.diff(calls.step, prepend=calls.step[0]) > 0)
        self.steps = int(step[-1]) + 1
        self._begin, self._end = gap[order][again], gap[order][again + 1]
        self._step = step[group[order][again]]

    def _by_rounds(self, key: Ints) -> Ints:
        """The order of the rounds for intervals sorted by key; sets where each round begins."""
        _, first, inverse, number = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        turn = np.arange(len(key)) - first[inverse]
        self._rounds = np.concatenate([[0], np.cumsum(np.bincount(turn))]).tolist()
        return np.lexsort((inverse, -number[inverse], turn))

    def best_reply(self, slot: Reals, copy: Reals) -> tuple[float, NDArray[Any], NDArray[Any]]:
        """The best choice at these prices of a slot in a gap and of a copy in a step.

        Returns hits less the prices paid, slots held in each gap, copies made in each step.
        """
        paid = np.concatenate([[0], np.cumsum(slot)])
        worth, price = 1 - (paid[self._end] - paid[self._begin]), copy[self._step]
        lead = self._forward(worth, price)
        kept, begun = self._backward(lead, price)
        held = np.bincount(self._begin, kept, self.gaps) - np.bincount(self._end, kept, self.gaps)
        return (
            float(lead[lead > 0].sum()),
            np.cumsum(held),
            np.bincount(self._step, begun.astype(np.float64), self.steps),
        )

    def _forward(self, worth: Reals, price: Reals) -> Reals:
        """For each interval how much better it is to keep it than not to, with the best choice of all before it.

        The best choice is worth the sum of the positive ones.
        """
        lead = worth - price
        for before, start, end in self._pairs_of_rounds():
            previous = lead[before : before + end - start]
            lead[start:end] = worth[start:end] + np.clip(previous, -price[start:end], 0)
        return lead

    def _backward(self, lead: Reals, price: Reals) -> tuple[Flags, Flags]:
        """Which intervals are kept, and which of them begin with a copy."""
        kept, begun = lead > 0, np.zeros(self.size, bool)
        for before, start, end in reversed(self._pairs_of_rounds()):
            here, previous = kept[start:end], lead[before : before + end - start]
            begun[start:end] = here & (previous <= -price[start:end])
            kept[before : before + end - start] = np.where(here, ~begun[start:end], previous > 0)
        begun[: self._rounds[1]] = kept[: self._rounds[1]]
        return kept, begun

    def _pairs_of_rounds(self) -> list[tuple[int, int, int]]:
        """Where a round begins, the next begins and the next ends; an expert has the same place in both."""
        return list(zip(self._rounds, self._rounds[1:], self._rounds[2:], strict=False))
