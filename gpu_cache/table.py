"""The table of the cache: which expert lies in which slot, in what state, and what is copied where."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from operator import neg
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpu_cache.admission import Admission, Costs, make_admission
from gpu_cache.errors import CacheError
from gpu_cache.geometry import NOWHERE, Geometry
from gpu_cache.policies import make_policy
from gpu_cache.policies.base import Policy

ABSENT, LOADING = -1, -2  # in place of the slot of an expert
EMPTY = -1  # in place of the key of a slot


class Lookup(NamedTuple):
    """The experts that a layer asked for, each in the order of the calls. hits: (expert, slot), pinned till release."""

    hits: list[tuple[int, int]]
    loading: list[int]
    misses: list[int]


class Fill(NamedTuple):
    """A copy to be made: the expert `key` into `slot`, which held `evicted`."""

    slot: int
    key: int
    evicted: int | None


class Counts(NamedTuple):
    """int64 [layers] each. calls = hits + loading + misses; fills and evictions by the layer that caused them."""

    calls: NDArray[np.int64]
    hits: NDArray[np.int64]
    loading: NDArray[np.int64]
    misses: NDArray[np.int64]
    fills: NDArray[np.int64]
    evictions: NDArray[np.int64]


class Table:
    """States of a slot: empty -> loading (`admit`, `prefetch`) -> ready (`publish`), pinned from a hit to `release`.

    A loading or pinned slot is never a victim. One thread calls everything. policy, admission: names, in any case;
    quota: copies that may begin in a step, None for no limit; costs: for break-even admission. Raises CacheError for
    unknown names.
    """

    def __init__(
        self,
        geometry: Geometry,
        policy: str = "LRU",
        admission: str = "always",
        quota: int | None = None,
        seed: int = 0,
        costs: Costs | None = None,
    ) -> None:
        if quota is not None and quota < 0:
            raise CacheError(f"quota of copies in a step: {quota}, must be 0 or more, or none for no limit")
        self.geometry = geometry
        self.quota = quota
        keys = geometry.layers * geometry.experts
        self._experts = geometry.experts
        self._index_of = [geometry.index_of(key) for key in range(keys)]
        self._where = [ABSENT] * keys
        self._key_of = [EMPTY] * geometry.slots
        self._blocked: set[int] = set()  # loading or pinned
        self._pinned: list[int] = []  # may name a slot twice
        self._free = [
            list(range(first + geometry.nways - 1, first - 1, -1)) for first in range(0, geometry.slots, geometry.nways)
        ]
        self._left = self._full_quota = keys if quota is None else quota
        self._missed_layer, self._missed = 0, list[int]()
        self._counts = [[0] * geometry.layers for _ in range(5)]
        self._hits, self._loading, self._misses, self._fills, self._evictions = self._counts
        self._bind(make_policy(policy, geometry, seed), make_admission(admission, geometry, costs))

    def begin_step(self, step: int) -> None:
        """A step begins, with a full quota."""
        self._left = self._full_quota
        self.policy.on_step(step)
        self.admission.on_step()

    def lookup(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None = None) -> Lookup:
        """Where the distinct experts that a layer asks for are; pins those that are ready.

        scores: the largest gate score of each expert. Experts are not checked: 0 <= expert < geometry.experts.
        """
        base, where = layer * self._experts, self._where
        if self._observers:
            self._observe(layer, [base + expert for expert in experts], scores)
        hits, loading, misses = [], [], []
        on_hit = self._on_hit
        for expert in experts:
            slot = where[base + expert]
            if slot >= 0:
                hits.append((expert, slot))
                if on_hit is not None:
                    on_hit(slot, base + expert)
            elif slot == ABSENT:
                misses.append(expert)
            else:
                loading.append(expert)
        if hits:
            slots = [slot for _, slot in hits]
            self._pinned += slots
            self._blocked.update(slots)
            self._hits[layer] += len(hits)
        if loading:
            self._loading[layer] += len(loading)
        self._misses[layer] += len(misses)
        self._missed_layer, self._missed = layer, misses
        return _new(Lookup, (hits, loading, misses))

    def admit(self) -> list[Fill]:
        """The copies to make of what the last lookup missed; their slots are loading from now on."""
        layer, misses = self._missed_layer, self._missed
        self._missed = []
        base, index_of, wants, fills = layer * self._experts, self._index_of, self._wants, list[Fill]()
        for expert in misses:
            key = base + expert
            index = index_of[key]
            if index >= 0 and (wants is None or wants(index, key)) and self._left and self._where[key] == ABSENT:
                fill = self._fill(index, key, layer)
                if fill is not None:
                    fills.append(fill)
        return fills

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[Fill]:
        """The copies to make for experts that a layer will ask for, within the quota; none evicts another of them.

        Admission is not asked: what is wanted at once needs no second sign.
        """
        keys = [layer * self._experts + expert for expert in experts]
        kept = {slot for slot in (self._where[key] for key in keys) if slot >= 0} - self._blocked
        self._blocked |= kept
        fills = []
        for key in keys:
            index = self._index_of[key]
            if index >= 0 and self._where[key] == ABSENT and self._left:
                fill = self._fill(index, key, layer)
                if fill is not None:
                    fills.append(fill)
        self._blocked -= kept
        return fills

    def release(self) -> None:
        """Unpin everything: the layer has been joined."""
        self._blocked.difference_update(self._pinned)
        self._pinned.clear()

    def publish(self, slot: int) -> None:
        """The copy into a loading slot has ended: its expert is ready."""
        key = self._key_of[slot]
        if self._where[key] != LOADING or key == EMPTY:
            raise _not_loading(slot)
        self._where[key] = slot
        self._blocked.discard(slot)

    def abandon(self, slot: int) -> None:
        """The copy into a loading slot has failed: the slot is empty."""
        if self._where[self._key_of[slot]] != LOADING or self._key_of[slot] == EMPTY:
            raise _not_loading(slot)
        self._blocked.discard(slot)
        self._evict(slot)
        insort(self._free[slot // self.geometry.nways], slot, key=neg)

    def preload(self, keys: Iterable[int]) -> list[Fill]:
        """Give experts slots before the first step, ready at once: their bytes must be there before the next lookup.

        Experts that are there already, or whose index is full, are left out. Raises CacheError for a key that the model
        does not have.
        """
        fills = []
        for key in keys:
            if not 0 <= key < len(self._where):
                raise CacheError(f"expert {key} is not of this model: it has {len(self._where)}, numbered from 0")
            index = self._index_of[key]
            if index != NOWHERE and self._free[index] and self._where[key] == ABSENT:
                slot = self._free[index].pop()
                self._occupy(slot, key)
                self.publish(slot)
                fills.append(Fill(slot, key, None))
        return fills

    def resident(self) -> list[int]:
        """The keys of the ready experts, in the order of their slots."""
        return [key for slot, key in enumerate(self._key_of) if key != EMPTY and self._where[key] == slot]

    @property
    def counts(self) -> Counts:
        """What happened since the table was made; `preload` is not counted."""
        hits, loading, misses, fills, evictions = (np.array(count, np.int64) for count in self._counts)
        return Counts(hits + loading + misses, hits, loading, misses, fills, evictions)

    def check_integrity(self) -> None:
        """Raises AssertionError if the states of slots and experts contradict each other."""
        key_of, where, nways = self._key_of, self._where, self.geometry.nways
        held = {slot: key for slot, key in enumerate(key_of) if key != EMPTY}
        loading = {slot for slot, key in held.items() if where[key] == LOADING}
        assert all(where[key] == slot for slot, key in held.items() if slot not in loading), "a slot that nobody finds"
        assert len(where) - where.count(ABSENT) == len(held), "an expert in two slots, or in none"
        assert all(self._index_of[key] == slot // nways for slot, key in held.items()), "an expert in a foreign index"
        assert loading.isdisjoint(self._pinned), "a loading slot is pinned"
        assert held.keys() >= set(self._pinned), "an empty slot is pinned"
        assert self._blocked == loading.union(self._pinned), "blocked slots are not the loading and pinned ones"
        assert [slot for free in self._free for slot in sorted(free)] == [
            slot for slot, key in enumerate(key_of) if key == EMPTY
        ], "free slots are not the empty ones"
        assert 0 <= self._left <= self._full_quota, "the quota is overdrawn"

    def _bind(self, policy: Policy, admission: Admission) -> None:
        """Keep the hooks that do something; the others cost nothing."""
        self.policy, self.admission = policy, admission
        self._victim = policy.victim
        self._on_hit = _hook(policy.on_hit, Policy.on_hit)
        self._on_fill = _hook(policy.on_fill, Policy.on_fill)
        self._on_evict = _hook(policy.on_evict, Policy.on_evict)
        self._on_call = _hook(policy.on_call, Policy.on_call)
        self._wants = _hook(admission.wants, Admission.wants)
        self._admission_on_call = _hook(admission.on_call, Admission.on_call)
        self._admission_on_fill = _hook(admission.on_fill, Admission.on_fill)
        self._observers = self._on_call is not None or self._admission_on_call is not None

    def _observe(self, layer: int, keys: list[int], scores: Sequence[float] | None) -> None:
        if self._on_call is not None:
            self._on_call(layer, keys, scores)
        if self._admission_on_call is not None:
            self._admission_on_call(keys)

    def _fill(self, index: int, key: int, layer: int) -> Fill | None:
        """Give an expert a slot of its index; None if every one is pinned or loading."""
        evicted = None
        if self._free[index]:
            slot = self._free[index].pop()
        else:
            victim = self._victim(index, self._blocked)
            if victim is None:
                return None
            slot, evicted = victim, self._evict(victim)
            self._evictions[layer] += 1
        self._occupy(slot, key)
        self._fills[layer] += 1
        self._left -= 1
        return _new(Fill, (slot, key, evicted))

    def _occupy(self, slot: int, key: int) -> None:
        self._key_of[slot] = key
        self._where[key] = LOADING
        self._blocked.add(slot)
        if self._on_fill is not None:
            self._on_fill(slot, key)
        if self._admission_on_fill is not None:
            self._admission_on_fill(slot // self.geometry.nways)

    def _evict(self, slot: int) -> int:
        """Take the expert out of a slot, which the caller fills or frees; returns its key."""
        key = self._key_of[slot]
        self._key_of[slot] = EMPTY
        self._where[key] = ABSENT
        if self._on_evict is not None:
            self._on_evict(slot, key)
        return key


def _not_loading(slot: int) -> CacheError:
    return CacheError(f"slot {slot} is not loading: a copy ends once, and only what the table asked for is copied")


_new = tuple.__new__  # makes a named tuple without a call into Python


_Hook = TypeVar("_Hook", bound=Callable[..., object])


def _hook(method: _Hook, default: Callable[..., object]) -> _Hook | None:
    """A method of an object, None if it is the one that does nothing."""
    return None if getattr(method, "__func__", None) is default else method
