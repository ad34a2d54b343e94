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
_KEPT = 1 << 12  # factors by which trust changes, of regrets so many misses late


class _Index:
    """recent: slots, the one called longest ago first. by_calls: a heap of (calls since it came, last call, slot), of
    which those of a time before are brought up to date, or dropped, where they are the least.
    regrets: by recency and by frequency, the misses at which keys were evicted so. trust: in recency, 0 to 1.
    """

    __slots__ = ("by_calls", "misses", "recent", "regrets", "trust")

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
        self._recent = [state.recent for state in self._indexes]
        self._now = 0  # calls
        self._calls = [0] * geometry.slots
        self._last = [0] * geometry.slots  # call
        self._entry: list[tuple[int, int, int] | None] = [None] * geometry.slots  # of `by_calls`; others are void
        self._most_entries = ENTRIES_PER_SLOT * geometry.nways + 64
        self._key_of = [0] * geometry.slots
        self._discount = DISCOUNT ** (1 / geometry.nways)
        self._factors = [self._factor(late) for late in range(min(_KEPT, 8 * geometry.nways))]

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        recent, nways, calls, last, now = self._recent, self.nways, self._calls, self._last, self._now
        for slot in slots:
            recent[slot // nways].move_to_end(slot)
            calls[slot] += 1
            last[slot] = now
            now += 1
        self._now = now

    def on_fill(self, slot: int, key: int) -> None:
        state = self._indexes[slot // self.nways]
        state.recent[slot] = None
        self._enter(state, slot, key)

    def on_evict(self, slot: int, key: int) -> None:
        del self._recent[slot // self.nways][slot]
        self._entry[slot] = None

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        state = self._indexes[index]
        recent = state.recent
        by_calls = self._random() >= state.trust
        for slot in recent:
            if slot not in blocked:
                break
        else:
            return None
        regrets = state.regrets[by_calls]
        if by_calls and self._calls[slot] > 1:  # else it is the victim of both rules: nothing was called less often
            slot = self._least_called(state.by_calls, blocked)
        regrets[self._key_of[slot]] = state.misses
        if len(regrets) > self.nways:
            regrets.popitem(last=False)
        recent.move_to_end(slot)
        self._enter(state, slot, key)
        return slot

    def _enter(self, state: _Index, slot: int, key: int) -> None:
        """An expert is new in a slot."""
        misses = state.misses = state.misses + 1
        by_recency, by_calls = state.regrets
        if key in by_recency:
            late = misses - by_recency.pop(key)
            trust, other = state.trust, self._factors[late] if late < len(self._factors) else self._factor(late)
            state.trust = trust / (trust + (1 - trust) * other)
        elif key in by_calls:
            late = misses - by_calls.pop(key)
            other = self._factors[late] if late < len(self._factors) else self._factor(late)
            trust = state.trust * other
            state.trust = trust / (trust + (1 - state.trust))
        now = self._now
        self._now, self._calls[slot], self._last[slot], self._key_of[slot] = now + 1, 1, now, key
        entry = self._entry[slot]
        if entry is None or entry[0] > 1:  # else the one that it has is not above that of a new expert
            entry = self._entry[slot] = (1, now, slot)
            heap = state.by_calls
            heappush(heap, entry)
            if len(heap) > self._most_entries:
                heap[:] = [entry for entry in heap if entry is self._entry[entry[2]]]
                heapify(heap)

    def _least_called(self, heap: list[tuple[int, int, int]], blocked: Collection[int]) -> int:
        """Of those that were called equally often the one called longest ago. There is one that is not blocked."""
        entries, calls, last, passed = self._entry, self._calls, self._last, []
        while True:
            entry = heap[0]
            slot = entry[2]
            if entries[slot] is not entry:
                heappop(heap)
            elif entry[1] != last[slot]:
                entries[slot] = entry = (calls[slot], last[slot], slot)
                heapreplace(heap, entry)
            elif slot in blocked:
                passed.append(heappop(heap))
            else:
                break
        for entry in passed:
            heappush(heap, entry)
        return slot

    def _factor(self, late: int) -> float:
        """By which the trust in the other rule grows when a miss is copied that came so many misses after it left."""
        return exp(LEARNING_RATE * self._discount**late)
