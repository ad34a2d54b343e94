"""Least recently used."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.policies.fifo import Fifo


class Lru(Fifo):
    """Evicts what was called longest ago. Calls of one lookup count in their order."""

    name = "LRU"

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        order, nways = self._order, self.nways
        for slot in slots:
            order[slot // nways].move_to_end(slot)
