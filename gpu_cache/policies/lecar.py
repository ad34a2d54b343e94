"""LeCaR: learns from regret whether to evict by recency or by frequency."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import exp
from random import Random

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

LEARNING_RATE = 0.45
ENTRIES_PER_SLOT = 4  # a heap is cleaned when it has more
DISCOUNT = 0.005  # of a regret that comes as many misses after the eviction as an index has ways


class _Index:
    """recent: slots, the one called longest ago first. by_calls: a heap of (calls since it came, last call, slot), of
    which those of a time before are brought up to date, or dropped, where they are the least.
    regrets: by recency and by frequency, the misses at which keys were evicted so. trust: in recency, 0 to 1.
    """

    def __init__(self) -> None:
        self.recent: OrderedDict[int, None] = OrderedDict()
        self.by_calls: list[tuple[int, int, int]] = []
        self.regrets: tuple[OrderedDict[int, int], OrderedDict[int, int]] = (OrderedDict(), OrderedDict())
        self.trust = 0.5
        self.misses = 0


class LeCar(Policy):
    """Vietri et al., Driving cache replacement with ML-based LeCaR, HotStorage 2018.

    Each eviction draws by which rule it is made, least recently or least frequently called. A miss of what was evicted
    by one rule takes trust from it, the more the shorter that was ago. As many evictions of each rule are remembered as
    an index has ways; calls count since the fill.
    """

    name = "LeCaR"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._random = Random(seed).random
        self._indexes = [_Index() for _ in range(geometry.nblocks)]
        self._now = 0  # calls
        self._calls = [0] * geometry.slots
        self._last = [0] * geometry.slots  # call
        self._entry: list[tuple[int, int, int] | None] = [None] * geometry.slots  # of `by_calls`; others are void
        self._most_entries = ENTRIES_PER_SLOT * geometry.nways + 64
        self._key_of = [0] * geometry.slots
        self._discount = DISCOUNT ** (1 / geometry.nways)

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        indexes, nways, calls, last, now = self._indexes, self.nways, self._calls, self._last, self._now
        for slot in slots:
            now += 1
            indexes[slot // nways].recent.move_to_end(slot)
            calls[slot] += 1
            last[slot] = now
        self._now = now

    def on_fill(self, slot: int, key: int) -> None:
        state = self._indexes[slot // self.nways]
        state.recent[slot] = None
        self._enter(state, slot, key)

    def _enter(self, state: _Index, slot: int, key: int) -> None:
        """An expert is new in a slot."""
        state.misses += 1
        for rule, regrets in enumerate(state.regrets):
            if key in regrets:
                self._learn(state, rule, regrets.pop(key))
        self._now += 1
        self._calls[slot], self._last[slot], self._key_of[slot] = 1, self._now, key
        entry = self._entry[slot] = (1, self._now, slot)
        heappush(state.by_calls, entry)
        if len(state.by_calls) > self._most_entries:
            state.by_calls[:] = [entry for entry in state.by_calls if entry is self._entry[entry[2]]]
            heapify(state.by_calls)

    def on_evict(self, slot: int, key: int) -> None:
        state = self._indexes[slot // self.nways]
        del state.recent[slot]
        self._entry[slot] = None

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        state = self._indexes[index]
        rule = int(self._random() >= state.trust)
        slot = self._least_called(state.by_calls, blocked) if rule else _first(state.recent, blocked)
        if slot is None:
            return None
        regrets = state.regrets[rule]
        regrets[self._key_of[slot]] = state.misses
        if len(regrets) > self.nways:
            regrets.popitem(last=False)
        state.recent.move_to_end(slot)
        self._enter(state, slot, key)
        return slot

    def _least_called(self, heap: list[tuple[int, int, int]], blocked: Collection[int]) -> int | None:
        """Of those that were called equally often the one called longest ago."""
        entries, calls, last, passed, found = self._entry, self._calls, self._last, [], None
        while heap and found is None:
            entry = heap[0]
            slot = entry[2]
            if entries[slot] is not entry:
                heappop(heap)
            elif entry[1] != last[slot]:
                entry = entries[slot] = (calls[slot], last[slot], slot)
                heapreplace(heap, entry)
            elif slot in blocked:
                passed.append(heappop(heap))
            else:
                found = slot
        for entry in passed:
            heappush(heap, entry)
        return found

    def _learn(self, state: _Index, rule: int, evicted: int) -> None:
        """A miss is copied: trust the rule less that evicted it, so many misses ago."""
        other = exp(LEARNING_RATE * self._discount ** (state.misses - evicted))
        recent, often = (
            (state.trust, (1 - state.trust) * other) if rule == 0 else (state.trust * other, 1 - state.trust)
        )
        state.trust = recent / (recent + often)


def _first(slots: OrderedDict[int, None], blocked: Collection[int]) -> int | None:
    for slot in slots:
        if slot not in blocked:
            return slot
    return None
