"""What no policy can beat, and what a placement that never changes gives; `docs/cache_bounds.md` has the proofs."""

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
    next_of, ranks = following.__getitem__, array("q", bytes(8 * total))
    for end, start in pairwise(reversed(starts)):
        called = keys[start:end]
        ranks[start:end] = array("q", map(next_of, called))
        called.sort(key=next_of)
        for rank, key in enumerate(called, start):
            following[key] = rank
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


def _replay(calls: Calls, geometry: Geometry, quota: int | None, bypass: bool) -> Schedule:
    """Of each index a heap of minus the ranks of next calls: the top is the furthest future.

    An expert that is hit gets a new entry, after all victims of its group are chosen. Its old one stays; it is of the
    past, hence nearer than those of all that may leave, and reaches the top only when nothing may.
    """
    ranks, owners = _future(calls)
    index_of = geometry.indexes().tolist()
    resident = bytearray(len(index_of))
    free, most = [geometry.nways] * geometry.nblocks, _ENTRIES_PER_SLOT * geometry.nways + 64
    heaps: list[list[int]] = [[] for _ in free]
    never = calls.total if bypass else calls.total + len(index_of)
    fills, evictions = ([0] * calls.layers for _ in range(2))
    counts: list[int] = []
    kept: list[tuple[int, int]]  # (rank, key) each
    missed: list[tuple[int, int]]
    first, current, left = 0, -1, -1
    for steps, layers, ends, keys, _, _ in calls.in_lists():
        begin, futures = 0, ranks[first : first + len(keys)].tolist()
        for step, layer, end in zip(steps, layers, ends, strict=True):
            if step != current:
                current, left = step, -1 if quota is None else quota
            kept, missed, past = [], [], first + end
            for call in zip(futures[begin:end], keys[begin:end], strict=True):
                (kept if resident[call[1]] else missed).append(call)
            begin = end
            counts.append(len(kept))
            if bypass and len(missed) > 1:
                missed.sort()
            for call in missed:
                rank, key = call
                index = index_of[key]
                if index < 0 or not left or rank >= never:
                    continue
                if free[index]:
                    free[index] -= 1
                else:
                    heap = heaps[index]
                    furthest = -heap[0] if heap else -1
                    if furthest < past or (bypass and furthest <= rank):
                        continue
                    resident[owners[furthest]] = 0
                    heappop(heap)
                    evictions[layer] += 1
                resident[key] = 1
                fills[layer] += 1
                left -= 1
                kept.append(call)
            for rank, key in kept:
                heap = heaps[index_of[key]]
                heappush(heap, -rank)
                if len(heap) > most:
                    heap[:] = [entry for entry in heap if -entry >= past]
                    heapify(heap)
        first += len(keys)
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
