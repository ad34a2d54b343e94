"""A table beside a plain model of what it must do: answers are compared, integrity is checked after each operation."""

from __future__ import annotations

from random import Random

from gpu_cache.admission import Costs
from gpu_cache.geometry import Geometry
from gpu_cache.table import Fill, Table

COSTS = Costs(copy=2.0, cpu=1.5, device=0.5)


class Walk:
    """Operations on both. Numbers that choose something are taken modulo what there is."""

    def __init__(self, geometry: Geometry, policy: str, admission: str, quota: int | None, seed: int) -> None:
        self.geometry = geometry
        self.table = Table(geometry, policy, admission, quota, seed, COSTS)
        self.slot_of: dict[int, int] = {}  # of keys, loading or ready
        self.loading: dict[int, int] = {}  # key of each loading slot
        self.pinned: set[int] = set()
        self.quota, self.left = quota, quota
        self.step = 0
        self.missed: list[int] = []
        self.totals = dict.fromkeys(("hits", "loading", "misses", "fills", "evictions"), 0)

    def begin_step(self) -> None:
        self.step += 1
        self.left = self.quota
        self.table.begin_step(self.step)
        self.table.check_integrity()

    def lookup(self, layer: int, experts: list[int], scores: list[float] | None = None) -> None:
        base = layer * self.geometry.experts
        ready = [e for e in experts if base + e in self.slot_of and self.slot_of[base + e] not in self.loading]
        on_the_way = [e for e in experts if self.slot_of.get(base + e) in self.loading]
        misses = [e for e in experts if base + e not in self.slot_of]
        found = self.table.lookup(layer, experts, scores)
        assert found.hits == [(e, self.slot_of[base + e]) for e in ready]
        assert (found.loading, found.misses) == (on_the_way, misses)
        self.pinned |= {slot for _, slot in found.hits}
        self.missed = [base + e for e in misses]
        for name, found_now in zip(("hits", "loading", "misses"), found, strict=True):
            self.totals[name] += len(found_now)
        self.table.check_integrity()

    def admit(self) -> None:
        fills = self.table.admit()
        wanted = [fill.key for fill in fills]
        assert [key for key in self.missed if key in wanted] == wanted  # some of the misses, in their order
        self.missed = []
        self._note(fills)
        self.table.check_integrity()

    def prefetch(self, layer: int, experts: list[int]) -> None:
        base = layer * self.geometry.experts
        fills = self.table.prefetch(layer, experts)
        asked = {base + e for e in experts}
        assert {fill.key for fill in fills} <= asked - self.slot_of.keys()
        assert not asked & {fill.evicted for fill in fills}
        self._note(fills)
        self.table.check_integrity()

    def publish(self, number: int) -> None:
        if self.loading:
            slot = sorted(self.loading)[number % len(self.loading)]
            del self.loading[slot]
            self.table.publish(slot)
        self.table.check_integrity()

    def abandon(self, number: int) -> None:
        if self.loading:
            slot = sorted(self.loading)[number % len(self.loading)]
            del self.slot_of[self.loading.pop(slot)]
            self.table.abandon(slot)
        self.table.check_integrity()

    def release(self) -> None:
        self.pinned.clear()
        self.table.release()
        self.table.check_integrity()

    def finish(self) -> None:
        """What the table says at the end."""
        ready = [key for key, slot in self.slot_of.items() if slot not in self.loading]
        assert sorted(self.table.resident()) == sorted(ready)
        counts = self.table.counts
        assert {name: int(getattr(counts, name).sum()) for name in self.totals} == self.totals
        assert (counts.calls == counts.hits + counts.loading + counts.misses).all()

    def _note(self, fills: list[Fill]) -> None:
        """Every fill takes an empty slot, or one that is neither loading nor pinned, of the index of its key."""
        for slot, key, evicted in fills:
            assert slot // self.geometry.nways == self.geometry.index_of(key)
            holder = {held: of for of, held in self.slot_of.items()}.get(slot)
            assert holder == evicted
            assert slot not in self.loading and slot not in self.pinned
            if evicted is not None:
                del self.slot_of[evicted]
                self.totals["evictions"] += 1
            self.slot_of[key] = slot
            self.loading[slot] = key
        self.totals["fills"] += len(fills)
        if self.left is not None:
            self.left -= len(fills)
            assert self.left >= 0


def storm(walk: Walk, operations: int, seed: int) -> None:
    """Random operations: mostly lookups and what follows them, in any order."""
    random = Random(seed)
    layers, experts = walk.geometry.layers, walk.geometry.experts
    top_k = max(1, experts // 4)
    for _ in range(operations):
        choice = random.random()
        if choice < 0.3:
            walk.lookup(random.randrange(layers), random.sample(range(experts), top_k))
        elif choice < 0.55:
            walk.admit()
        elif choice < 0.75:
            walk.publish(random.randrange(1000))
        elif choice < 0.87:
            walk.release()
        elif choice < 0.94:
            walk.begin_step()
        elif choice < 0.97:
            walk.prefetch(random.randrange(layers), random.sample(range(experts), top_k))
        else:
            walk.abandon(random.randrange(1000))
