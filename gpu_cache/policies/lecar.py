"""LeCaR: learns from regret whether to evict by recency or by frequency."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from math import exp
from random import Random

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

LEARNING_RATE = 0.45
DISCOUNT = 0.005  # of a regret that comes as many misses after the eviction as an index has ways


class _Index:
    """recent: slots, the one called longest ago first. by_calls: the same slots by their calls since they came.
    regrets: by recency and by frequency, the misses at which keys were evicted so. trust: in recency, 0 to 1.
    """

    def __init__(self) -> None:
        self.recent: OrderedDict[int, None] = OrderedDict()
        self.by_calls: dict[int, OrderedDict[int, None]] = {}
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
        self._calls = [0] * geometry.slots
        self._key_of = [0] * geometry.slots
        self._discount = DISCOUNT ** (1 / geometry.nways)

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        nways, calls = self.nways, self._calls
        for slot in slots:
            state = self._indexes[slot // nways]
            state.recent.move_to_end(slot)
            self._leave(state, slot)
            calls[slot] += 1
            state.by_calls.setdefault(calls[slot], OrderedDict())[slot] = None

    def on_fill(self, slot: int, key: int) -> None:
        state = self._indexes[slot // self.nways]
        self._learn(state, key)
        self._calls[slot], self._key_of[slot] = 1, key
        state.recent[slot] = None
        state.by_calls.setdefault(1, OrderedDict())[slot] = None

    def on_evict(self, slot: int, key: int) -> None:
        state = self._indexes[slot // self.nways]
        del state.recent[slot]
        self._leave(state, slot)

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        state = self._indexes[index]
        rule = int(self._random() >= state.trust)
        slot = self._least_called(state, blocked) if rule else _first(state.recent, blocked)
        if slot is None:
            return None
        regrets = state.regrets[rule]
        regrets[self._key_of[slot]] = state.misses
        if len(regrets) > self.nways:
            regrets.popitem(last=False)
        self.on_evict(slot, self._key_of[slot])
        self.on_fill(slot, key)
        return slot

    def _least_called(self, state: _Index, blocked: Collection[int]) -> int | None:
        slot = _first(state.by_calls[min(state.by_calls)], blocked)
        if slot is None:
            slot = next(
                (s for calls in sorted(state.by_calls) for s in state.by_calls[calls] if s not in blocked), None
            )
        return slot

    def _learn(self, state: _Index, key: int) -> None:
        """A miss is copied: trust the rule less that evicted it."""
        state.misses += 1
        for rule, regrets in enumerate(state.regrets):
            evicted = regrets.pop(key, None)
            if evicted is not None:
                other = exp(LEARNING_RATE * self._discount ** (state.misses - evicted))
                recent, often = (
                    (state.trust, (1 - state.trust) * other) if rule == 0 else (state.trust * other, 1 - state.trust)
                )
                state.trust = recent / (recent + often)

    def _leave(self, state: _Index, slot: int) -> None:
        calls = self._calls[slot]
        slots = state.by_calls[calls]
        del slots[slot]
        if not slots:
            del state.by_calls[calls]


def _first(slots: Iterable[int], blocked: Collection[int]) -> int | None:
    for slot in slots:
        if slot not in blocked:
            return slot
    return None
