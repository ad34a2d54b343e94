"""Hits of every number of ways at once, from one pass over a trace: where a policy's choices allow it, exactly.

For each call the pass finds which numbers of ways hit. Those of Belady's rules and of fixed experts are all from some
number on, their stack distance (Mattson et al., Evaluation techniques for storage hierarchies, 1970). LRU's are, too,
but for as many numbers as there are experts in a lookup, because the order of its calls depends on which of them hit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappushpop
from typing import NamedTuple

import numpy as np

from gpu_cache.bounds import next_ranks
from gpu_cache.errors import CacheError
from gpu_cache.geometry import Geometry
from gpu_cache.trace import Calls, Ints


@dataclass(frozen=True)
class Curve:
    """hits: int64 [ways + 1], of all calls, with 0, 1, 2, ... ways in each index; calls: all of them."""

    hits: Ints
    calls: int


class _Group(NamedTuple):
    """The calls of a lookup that belong to an index. numbers: of the calls among all."""

    at: int
    numbers: list[int]
    keys: list[int]


def curve(calls: Calls, policy: str, nblocks: int, mapping: str = "modulo") -> Curve:
    """What `gpu_cache.simulator.replay` hits with each number of ways, copies ending at once and without a limit.

    Raises CacheError for a policy that has no such curve.
    """
    if policy not in CURVES:
        raise CacheError(f"{policy} has no curve from one pass; those that have one: {', '.join(CURVES)}")
    geometry = Geometry(nblocks, 1, calls.layers, calls.experts, mapping)
    ways = calls.layers * calls.experts // nblocks  # more are no cache of the model
    more = np.zeros(calls.layers * calls.experts + 2, np.int64)  # hits of so many ways, less those of one way less
    CURVES[policy](calls, geometry, more)
    return Curve(np.cumsum(more[: ways + 1]), calls.total)


def _groups(calls: Calls, geometry: Geometry) -> Iterator[_Group]:
    """In their order; calls that are never cached are left out."""
    index_of = geometry.indexes().tolist()
    first = 0
    for _, layer, experts, _ in calls:
        parts: dict[int, _Group] = {}
        for number, expert in enumerate(experts, first):
            key = layer * calls.experts + expert
            index = index_of[key]
            if index >= 0:
                group = parts.get(index)
                if group is None:
                    group = parts[index] = _Group(index, [], [])
                group.numbers.append(number)
                group.keys.append(key)
        yield from parts.values()
        first += len(experts)


def _belady(calls: Calls, geometry: Geometry, more: Ints) -> None:
    _by_future(calls, geometry, more, bypass=False)


def _bypass_belady(calls: Calls, geometry: Geometry, more: Ints) -> None:
    _by_future(calls, geometry, more, bypass=True)


def _by_future(calls: Calls, geometry: Geometry, more: Ints, bypass: bool) -> None:
    """A stack for each index: with M ways it holds the first M of its stack."""
    ranks = next_ranks(calls).tolist()
    future = [0] * (calls.layers * calls.experts)
    stacks: list[list[int]] = [[] for _ in range(geometry.nblocks)]
    for index, numbers, keys in _groups(calls, geometry):
        stack, called = stacks[index], set(keys)
        for depth, key in enumerate(stack, 1):
            if key in called:
                more[depth] += 1
        places = [ranks[number] for number in numbers] if bypass else range(-len(keys), 0)
        stacks[index] = _restacked(stack, dict(zip(keys, places, strict=True)), future)
        for number, key in zip(numbers, keys, strict=True):
            future[key] = ranks[number]


def _restacked(stack: list[int], called: dict[int, int], future: list[int]) -> list[int]:
    """The stack after a lookup. called: its experts, and for each what it is compared by as a miss: the smallest is
    admitted first; others are compared by their futures.

    With one way more there is one expert more before the lookup, z. If z was called, it is now a hit: it stays, and
    waits for no admission. If not, the best of those that wait stays in its place.
    """
    waiting = [(place, key) for key, place in called.items()]
    heapify(waiting)
    missed = set(called)
    made = []
    for z in stack:
        if z not in called:
            key = heappushpop(waiting, (future[z], z))[1]
            missed.discard(key)
        elif z in missed:
            waiting.remove((called[z], z))
            heapify(waiting)
            missed.discard(z)
            key = z
        else:
            key = heappop(waiting)[1]
            missed.discard(key)
        made.append(key)
    return made + [key for _, key in sorted(waiting)]


@dataclass(frozen=True, eq=False)
class _Lookup:
    """The last lookup of some experts. hits: for each of them the numbers of ways with which it hit, as bits."""

    keys: list[int]
    hits: list[int]
    orders: dict[int, list[int]] = field(default_factory=dict)

    def order(self, ways: int) -> list[int]:
        """The oldest first: hits in the order of the calls, then the misses that found room."""
        order = self.orders.get(ways)
        if order is None:
            hit = [bool(hits >> ways & 1) for hits in self.hits]
            missed = [key for key, is_hit in zip(self.keys, hit, strict=True) if not is_hit]
            order = [key for key, is_hit in zip(self.keys, hit, strict=True) if is_hit]
            order += missed[: ways - len(order)]
            self.orders[ways] = order
        return order


def _lru(calls: Calls, geometry: Geometry, more: Ints) -> None:
    """Experts of an index by their last lookup, the newest first: one that others were called after, A of them, has
    left where there are at most A ways. Within its lookup the order depends on which of its calls hit.
    """
    stacks: list[list[int]] = [[] for _ in range(geometry.nblocks)]
    last: dict[int, _Lookup] = {}
    every = (1 << len(more)) - 1
    for index, _, keys in _groups(calls, geometry):
        stack, hits = stacks[index], []
        for key in keys:
            lookup = last.get(key)
            if lookup is None:
                hits.append(0)
                continue
            newer, same = _block(stack, key, lookup, last)
            sure = newer + len(same)  # with so many ways, or more, it hits
            more[sure] += 1
            found = every >> sure << sure
            for ways in range(newer + 1, sure):
                if newer + _newer_within(lookup, key, same, ways) < ways:
                    more[ways] += 1
                    more[ways + 1] -= 1
                    found |= 1 << ways
            hits.append(found)
        called = set(keys)
        stacks[index] = keys + [key for key in stack if key not in called]
        last.update(dict.fromkeys(keys, _Lookup(keys, hits)))


def _block(stack: list[int], key: int, lookup: _Lookup, last: Mapping[int, _Lookup]) -> tuple[int, set[int]]:
    """How many experts were called after the last lookup of one, and those that were last called in it."""
    begin = end = stack.index(key)
    while begin and last[stack[begin - 1]] is lookup:
        begin -= 1
    while end < len(stack) and last[stack[end]] is lookup:
        end += 1
    return begin, set(stack[begin:end])


def _newer_within(lookup: _Lookup, key: int, same: set[int], ways: int) -> int:
    """How many of `same` are newer than an expert of their lookup, with so many ways; as many as ways if it found no
    room there.
    """
    order = lookup.order(ways)
    return sum(one in same for one in order[order.index(key) + 1 :]) if key in order else ways


def _static_best(calls: Calls, geometry: Geometry, more: Ints) -> None:
    """The most called experts of each index, so many of them."""
    count = np.bincount(calls.key, minlength=calls.layers * calls.experts)
    index = geometry.indexes()
    for at in range(geometry.nblocks):
        best = np.sort(count[index == at])[::-1]
        more[1 : len(best) + 1] += best


CURVES: Mapping[str, Callable[[Calls, Geometry, Ints], None]] = {
    "LRU": _lru,
    "Belady": _belady,
    "bypass-Belady": _bypass_belady,
    "static-best": _static_best,
}
