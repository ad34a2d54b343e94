"""A replacement policy of your own. Change what is below, then

hybrid policy check my_policy.py
hybrid simulate --trace trace.csv --policy all,my_policy.py
hybrid run --device simulated --cache-replace-policy my_policy.py --prompt "Hello"
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy


class MyPolicy(Policy):
    """Evicts what was called longest ago, but spares once what was called twice or more since its fill.

    A slot belongs to index slot // nways; a key is layer * experts + expert. What a hook is given is the table's:
    read it, do not keep or change it. Leave out the hooks that you do not need.
    """

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)  # sets self.geometry and self.nways
        # Of each index its slots, the next victim first, and the calls since their fill.
        self._calls: list[dict[int, int]] = [{} for _ in range(geometry.nblocks)]

    def on_step(self, step: int) -> None:
        """A step begins."""

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        """A layer calls experts; slots are of those that are ready. The gate's scores may be unknown."""
        for slot in slots:
            calls = self._calls[slot // self.nways]
            calls[slot] = calls.pop(slot) + 1  # goes to the end

    def on_fill(self, slot: int, key: int) -> None:
        """An expert is copied into a slot that was empty."""
        self._calls[slot // self.nways][slot] = 0

    def on_evict(self, slot: int, key: int) -> None:
        """The copy of an expert failed: its slot is empty again."""
        del self._calls[slot // self.nways][slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        """The slot of the index that `key` gets; never one of `blocked`, None if all are."""
        calls = self._calls[index]
        free = [slot for slot in calls if slot not in blocked]
        for slot in free:
            if calls[slot] < 2:
                return self._refill(index, slot)
            calls[slot] = 0
        return self._refill(index, free[0]) if free else None

    def _refill(self, index: int, slot: int) -> int:
        del self._calls[index][slot]
        self._calls[index][slot] = 0
        return slot
