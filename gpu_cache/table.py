"""The table of the cache: which expert is in which slot, the state of each slot, and which copies to make."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from operator import neg
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_cache.admission import Admission, Costs, make_admission
from gpu_cache.errors import CacheError
from gpu_cache.geometry import NOWHERE, Geometry
from gpu_cache.hooks import overridden
from gpu_cache.policies import make_policy
from gpu_cache.policies.base import Policy

ABSENT, LOADING = -1, -2  # in place of the slot of an expert
EMPTY = -1  # in place of the key of a slot


class Lookup(NamedTuple):
    """Result of a lookup, each list in the order of the calls. hits: (expert, slot), pinned until `release`."""

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

    A loading or pinned slot is never a victim. One thread calls everything. policy: a name, in any case, or a policy
    made for this geometry; admission: alike; quota: copies that may begin in a step, None for no limit;
    costs: for break-even admission. Raises CacheError for unknown names.
    """

    def __init__(
        self,
        geometry: Geometry,
        policy: str | Policy = "LRU",
        admission: str | Admission = "always",
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
        self._index_of = geometry.indexes().tolist()
        self._where = [ABSENT] * (keys + 1)  # the last is that of EMPTY
        self._key_of = [EMPTY] * geometry.slots
        self._blocked: set[int] = set()  # loading; `_fill` adds the pinned ones while it looks for victims
        self._pinned: list[int] = []  # may name a slot twice
        self._free = [
            list(range(first + geometry.nways - 1, first - 1, -1)) for first in range(0, geometry.slots, geometry.nways)
        ]
        self._left = self._full_quota = keys if quota is None else quota
        self._missed_layer, self._missed = 0, list[int]()
        self._counts = [[0] * geometry.layers for _ in range(5)]
        self._hits, self._loading, self._misses, self._fills, self._evictions = self._counts
        chosen = make_policy(policy, geometry, seed) if isinstance(policy, str) else policy
        rule = make_admission(admission, geometry, costs) if isinstance(admission, str) else admission
        self._bind(chosen, rule)

    def begin_step(self, step: int) -> None:
        """A step begins, with a full quota."""
        self._left = self._full_quota
        self.policy.on_step(step)
        self.admission.on_step()

    def lookup(self, layer: int, experts: Sequence[int], scores: Sequence[float] | None = None) -> Lookup:
        """Look up the distinct experts that a layer calls, and pin the ready ones.

        scores: the largest gate score of each expert. Experts are not checked: 0 <= expert < geometry.experts.
        """
        base, where = layer * self._experts, self._where
        if self._on_call is not None:
            self._on_call([base + expert for expert in experts])
        hits: list[tuple[int, int]] = []
        slots: list[int] = []
        loading: list[int] = []
        misses: list[int] = []
        for expert in experts:
            slot = where[base + expert]
            if slot >= 0:
                hits.append((expert, slot))
                slots.append(slot)
            elif slot == ABSENT:
                misses.append(expert)
            else:
                loading.append(expert)
        if self._on_lookup is not None:
            self._on_lookup(layer, experts, scores, slots)
        if slots:
            self._pinned += slots
            self._hits[layer] += len(slots)
        if loading:
            self._loading[layer] += len(loading)
        if misses:
            self._misses[layer] += len(misses)
        self._missed_layer, self._missed = layer, misses
        return _new(Lookup, (hits, loading, misses))

    def admit(self) -> list[Fill]:
        """The copies to make for misses of the last lookup; marks their slots as loading."""
        layer, misses = self._missed_layer, self._missed
        self._missed = []
        return self._fill(layer, misses, self._wants, self._pinned)

    def prefetch(self, layer: int, experts: Sequence[int]) -> list[Fill]:
        """The copies to make for experts that a layer will call, within the quota; none evicts another of them.

        Skips the admission rule: an expert that is needed now has nothing to prove.
        """
        base, where = layer * self._experts, self._where
        ready = [where[base + expert] for expert in experts if where[base + expert] >= 0]
        return self._fill(layer, experts, None, self._pinned + ready)

    def release(self) -> None:
        """Unpin all slots, after the layer has been joined."""
        self._pinned.clear()

    def publish(self, *slots: int) -> None:
        """Mark loading slots as ready, after their copies have ended."""
        where, key_of = self._where, self._key_of
        for slot in slots:
            key = key_of[slot]
            if where[key] != LOADING:
                raise _not_loading(slot)
            where[key] = slot
        self._blocked.difference_update(slots)

    def abandon(self, slot: int) -> None:
        """Mark a loading slot as empty, after its copy has failed."""
        key = self._key_of[slot]
        if self._where[key] != LOADING:
            raise _not_loading(slot)
        self._blocked.discard(slot)
        self._key_of[slot], self._where[key] = EMPTY, ABSENT
        if self._on_evict is not None:
            self._on_evict(slot, key)
        insort(self._free[slot // self.geometry.nways], slot, key=neg)

    def preload(self, keys: Iterable[int]) -> list[Fill]:
        """Give experts slots before the first step and mark them ready; copy their bytes before the next lookup.

        Skips experts that already have a slot or whose index is full. Raises CacheError for a key that the model
        does not have.
        """
        fills = []
        for key in keys:
            if not 0 <= key < len(self._index_of):
                raise CacheError(f"expert {key} is not of this model: it has {len(self._index_of)}, numbered from 0")
            index = self._index_of[key]
            if index != NOWHERE and self._free[index] and self._where[key] == ABSENT:
                slot = self._free[index].pop()
                self._key_of[slot], self._where[key] = key, slot
                self._report_fill(index, slot, key)
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
        assert self._where[EMPTY] == ABSENT, "an empty slot is somewhere"
        key_of, where, nways = self._key_of, self._where, self.geometry.nways
        held = {slot: key for slot, key in enumerate(key_of) if key != EMPTY}
        loading = {slot for slot, key in held.items() if where[key] == LOADING}
        assert all(where[key] == slot for slot, key in held.items() if slot not in loading), "a slot that nobody finds"
        assert sum(slot != ABSENT for slot in where) == len(held), "an expert in two slots, or in none"
        assert all(self._index_of[key] == slot // nways for slot, key in held.items()), "an expert in a foreign index"
        assert loading.isdisjoint(self._pinned), "a loading slot is pinned"
        assert held.keys() >= set(self._pinned), "an empty slot is pinned"
        assert self._blocked == loading, "blocked slots are not the loading ones"
        assert [slot for free in self._free for slot in sorted(free)] == [
            slot for slot, key in enumerate(key_of) if key == EMPTY
        ], "free slots are not the empty ones"
        assert 0 <= self._left <= self._full_quota, "the quota is overdrawn"

    def _bind(self, policy: Policy, admission: Admission) -> None:
        """Keep only the hooks that are overridden, so that the others cost nothing."""
        self.policy, self.admission = policy, admission
        self._replace = policy.replace
        self._on_lookup = overridden(policy.on_lookup, Policy.on_lookup)
        self._on_fill = overridden(policy.on_fill, Policy.on_fill)
        self._on_evict = overridden(policy.on_evict, Policy.on_evict)
        self._wants = overridden(admission.wants, Admission.wants)
        self._on_call = overridden(admission.on_call, Admission.on_call)
        self._on_admitted = overridden(admission.on_fill, Admission.on_fill)

    def _fill(
        self, layer: int, experts: Iterable[int], wants: Callable[[int, int], bool] | None, kept: Sequence[int]
    ) -> list[Fill]:
        """Give wanted experts slots of their indexes, within the quota and if an index has an unblocked slot.

        kept: ready slots that must not be evicted.
        """
        where, key_of, index_of, blocked = self._where, self._key_of, self._index_of, self._blocked
        fills: list[Fill] = []
        free, replace, base, left, evictions = self._free, self._replace, layer * self._experts, self._left, 0
        blocked.update(kept)
        for expert in experts:
            key = base + expert
            index = index_of[key]
            if index < 0 or (wants is not None and not wants(index, key)) or not left or where[key] != ABSENT:
                continue
            evicted = None
            if free[index]:
                slot = free[index].pop()
                self._report_fill(index, slot, key)
            else:
                chosen = replace(index, key, blocked)
                if chosen is None:
                    continue
                slot, evicted = chosen, key_of[chosen]
                where[evicted] = ABSENT
                evictions += 1
                if self._on_admitted is not None:
                    self._on_admitted(index)
            key_of[slot], where[key] = key, LOADING
            blocked.add(slot)
            left -= 1
            fills.append(_new(Fill, (slot, key, evicted)))
        blocked.difference_update(kept)
        self._left = left
        self._fills[layer] += len(fills)
        self._evictions[layer] += evictions
        return fills

    def _report_fill(self, index: int, slot: int, key: int) -> None:
        """Report that an empty slot was filled."""
        if self._on_fill is not None:
            self._on_fill(slot, key)
        if self._on_admitted is not None:
            self._on_admitted(index)


def _not_loading(slot: int) -> CacheError:
    return CacheError(f"slot {slot} is not loading: a copy ends once, and only what the table asked for is copied")


_new = tuple.__new__  # makes a named tuple without a call into Python
