"""What no policy can beat, and what a placement that never changes gives; `docs/cache.md` has the proofs."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from gpu_cache.geometry import Geometry
from gpu_cache.trace import Calls, Ints

_ENTRIES_PER_SLOT = 4  # a heap is cleaned when it has more


@dataclass(frozen=True)
class Schedule:
    """What a placement that knows the whole trace reaches. hits, fills, evictions: int64 [layers].

    found: int64 [groups], hits of every group.
    """

    hits: Ints
    fills: Ints
    evictions: Ints
    found: Ints


def belady(calls: Calls, geometry: Geometry, quota: int | None = None) -> Schedule:
    """Every miss is admitted while the quota of its step lasts; the victim is the expert whose future is furthest.

    Belady, A study of replacement algorithms for a virtual-storage computer, 1966; for groups of calls that pin
    their hits.
    """
    return _replay(calls, geometry, quota, bypass=False)


def bypass_belady(calls: Calls, geometry: Geometry, quota: int | None = None) -> Schedule:
    """As `belady`, but a miss whose future is further than that of every possible victim is not admitted.

    Without a quota nothing that copies on a miss hits more often, whatever its policy, admission, quota and delay.
    With one this is a schedule that can be had; `quota_bound` says what cannot.
    """
    return _replay(calls, geometry, quota, bypass=True)


def next_ranks(calls: Calls) -> array[int]:
    """For each call the rank of its expert's next call: smaller is sooner; total + key if there is none.

    Ranks order calls by group, and within a group by the ranks of their own next calls. So they compare whole
    futures: of two experts that are next asked for together, the one that is wanted sooner after that comes first.
    """
    keys, starts, total = calls.key.tolist(), calls.start.tolist(), calls.total
    following = list(range(total, total + calls.layers * calls.experts))
    ranks = array("q", bytes(8 * total))
    for end, start in pairwise(reversed(starts)):
        for call in range(start, end):
            ranks[call] = following[keys[call]]
        for rank, call in enumerate(sorted(range(start, end), key=ranks.__getitem__), start):
            following[keys[call]] = rank
    return ranks


def _owners(calls: Calls, ranks: array[int]) -> array[int]:
    """The key of the expert that a rank belongs to."""
    owner = np.arange(-calls.total, calls.layers * calls.experts)
    following = np.frombuffer(ranks, np.int64)
    called_again = following < calls.total
    owner[following[called_again]] = calls.key[called_again]
    return array("q", owner.tobytes())


class _Future(NamedTuple):
    """`next_ranks` and `_owners` of a trace, which are the same for every cache."""

    ranks: array[int]
    owners: array[int]


_FUTURES: WeakKeyDictionary[Calls, _Future] = WeakKeyDictionary()  # of traces that are replayed several times


def _future(calls: Calls) -> _Future:
    if calls not in _FUTURES:
        ranks = next_ranks(calls)
        _FUTURES[calls] = _Future(ranks, _owners(calls, ranks))
    return _FUTURES[calls]


class _Sets:
    """The experts of each index in a heap of (minus rank of the next call): the top is the furthest future.

    An expert that is hit gets a new entry. Its old one stays; it is of the past, hence smaller than those of all
    that may be evicted, and reaches the top only when nothing may be.
    """

    def __init__(self, calls: Calls, geometry: Geometry) -> None:
        self.ranks, self.owners = _future(calls)
        self.index_of = geometry.indexes().tolist()
        self.resident = bytearray(len(self.index_of))
        self.free = [geometry.nways] * geometry.nblocks
        self.heaps: list[list[int]] = [[] for _ in self.free]
        self.largest = _ENTRIES_PER_SLOT * geometry.nways + 64

    def make_room(self, index: int, now: int, nearer_than: int) -> int | None:
        """1 if the furthest expert of an index left, 0 if a slot was free, None if there is no room.

        now: the first rank that is not past; nearer_than: only an expert with a larger rank may leave.
        """
        if self.free[index]:
            self.free[index] -= 1
            return 0
        heap = self.heaps[index]
        if not heap or -heap[0] < now or -heap[0] <= nearer_than:
            return None
        self.resident[self.owners[-heappop(heap)]] = 0
        return 1

    def put(self, calls: list[tuple[int, int]], now: int) -> None:
        """Enter what was called, (rank, key) each, or give it a new entry."""
        resident, heaps, index_of, largest = self.resident, self.heaps, self.index_of, self.largest
        for rank, key in calls:
            resident[key] = 1
            heap = heaps[index_of[key]]
            heappush(heap, -rank)
            if len(heap) > largest:
                heap[:] = [entry for entry in heap if -entry >= now]
                heapify(heap)


def _replay(calls: Calls, geometry: Geometry, quota: int | None, bypass: bool) -> Schedule:
    sets = _Sets(calls, geometry)
    ranks, resident, index_of = sets.ranks, sets.resident, sets.index_of
    never = calls.total if bypass else calls.total + len(index_of)
    fills, evictions = ([0] * calls.layers for _ in range(2))
    counts: list[int] = []
    first, current, left = 0, -1, -1
    for step, layer, experts, _ in calls:
        if step != current:
            current, left = step, -1 if quota is None else quota
        base, end = layer * calls.experts, first + len(experts)
        group = [(ranks[first + i], base + expert) for i, expert in enumerate(experts)]
        kept = [call for call in group if resident[call[1]]]
        counts.append(len(kept))
        if len(kept) < len(group):
            missed = [call for call in group if not resident[call[1]]]
            for rank, key in sorted(missed) if bypass else missed:
                index = index_of[key]
                if index < 0 or not left or rank >= never:
                    continue
                evicted = sets.make_room(index, end, rank if bypass else -1)
                if evicted is not None:
                    evictions[layer] += evicted
                    fills[layer] += 1
                    left -= 1
                    kept.append((rank, key))
        sets.put(kept, end)
        first = end
    found = np.array(counts)
    return Schedule(calls.by_layer(found), np.array(fills), np.array(evictions), found)


def static_best(calls: Calls, geometry: Geometry) -> Schedule:
    """A placement that never changes: in each index the most called experts of the trace."""
    count = np.bincount(calls.key, minlength=calls.layers * calls.experts)
    index = geometry.indexes()
    order = np.lexsort((-count, index))
    _, begin = np.unique(index[order], return_index=True)
    place = np.arange(len(order)) - np.repeat(begin, np.diff(np.append(begin, len(order))))
    resident = np.zeros(len(count), bool)
    resident[order] = (place < geometry.nways) & (index[order] >= 0)
    return _static(calls, resident)


def static_layers(calls: Calls, geometry: Geometry) -> Schedule:
    """Whole layers in the same slots, the first ones: what offloading by layer does."""
    resident = np.arange(calls.layers * calls.experts) // calls.experts < geometry.slots // calls.experts
    return _static(calls, resident)


def _static(calls: Calls, resident: NDArray[np.bool_]) -> Schedule:
    found = np.add.reduceat(resident[calls.key].astype(np.int64), calls.start[:-1])
    never = np.zeros(calls.layers, np.int64)
    return Schedule(calls.by_layer(found), never, never, found)
