"""S3-FIFO: a small queue that filters, a main queue, and the memory of what left the small one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy
from gpu_cache.policies.clock import first_uncalled

SMALL = 0.1  # of the ways of an index
GHOSTS = 0.9
MAX_CALLS = 3  # counted
CALLS_TO_MOVE = 2  # from the small queue to the main one


class _Queues:
    """Of an index. small, main: slots, oldest first; ghosts: keys."""

    def __init__(self) -> None:
        self.small: OrderedDict[int, None] = OrderedDict()
        self.main: OrderedDict[int, None] = OrderedDict()
        self.ghosts: OrderedDict[int, None] = OrderedDict()
        self.full = False  # whether it ever was


class S3Fifo(Policy):
    """Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023.

    A tenth of the ways, one at least, are small; until the first eviction what they cannot take goes to the main queue,
    as in the authors' libCacheSim. What is blocked is passed over and keeps its place.
    """

    name = "S3-FIFO"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._queues = [_Queues() for _ in range(geometry.nblocks)]
        self._calls = bytearray(geometry.slots)
        self._key_of = [0] * geometry.slots
        self._most_small = max(1, int(geometry.nways * SMALL))
        self._most_ghosts = int(geometry.nways * GHOSTS)

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        calls = self._calls
        for slot in slots:
            if calls[slot] < MAX_CALLS:
                calls[slot] += 1

    def on_fill(self, slot: int, key: int) -> None:
        self._enter(self._queues[slot // self.nways], slot, key)

    def on_evict(self, slot: int, key: int) -> None:
        self._leave(self._queues[slot // self.nways], slot)

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        queues = self._queues[index]
        queues.full = True
        slot = None
        if len(queues.main) <= self.nways - self._most_small:
            slot = self._from_small(queues, blocked)
        if slot is None:
            slot = first_uncalled(queues.main, self._calls, blocked)
        if slot is None:
            slot = self._from_small(queues, blocked)
        if slot is not None:
            self._leave(queues, slot)
            self._enter(queues, slot, key)
        return slot

    def _enter(self, queues: _Queues, slot: int, key: int) -> None:
        self._calls[slot] = 0
        self._key_of[slot] = key
        if key in queues.ghosts:
            del queues.ghosts[key]
            queues.main[slot] = None
        elif queues.full or len(queues.small) < self._most_small:
            queues.small[slot] = None
        else:
            queues.main[slot] = None
        while len(queues.ghosts) > self._most_ghosts:
            queues.ghosts.popitem(last=False)

    def _leave(self, queues: _Queues, slot: int) -> None:
        if slot in queues.small:
            del queues.small[slot]
            queues.ghosts[self._key_of[slot]] = None  # one too many until the next fill, of the oldest perhaps
        else:
            del queues.main[slot]

    def _from_small(self, queues: _Queues, blocked: Collection[int]) -> int | None:
        """The oldest that was not called often; those that were move to the main queue."""
        calls, found, moved = self._calls, None, []
        for slot in queues.small:
            if slot not in blocked:
                if calls[slot] < CALLS_TO_MOVE:
                    found = slot
                    break
                moved.append(slot)
        for slot in moved:
            del queues.small[slot]
            queues.main[slot] = None
            calls[slot] = 0
        return found
