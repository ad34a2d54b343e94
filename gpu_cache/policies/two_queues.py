"""2Q: a queue for what is new, LRU for what came back soon after it had left."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

NEW = 0.25  # of the ways of an index
GHOSTS = 0.5


class TwoQueues(Policy):
    """Johnson and Shasha, 2Q: a low overhead high performance buffer management replacement algorithm, VLDB 1994.

    The full version with the shares that its authors advise, a quarter and a half. While the queue of new experts is
    longer than its share its oldest leaves, called or not, and its key is remembered; else the one of the others that
    was called longest ago. An expert that is remembered when it is filled again belongs to the others.
    """

    name = "2Q"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._most_new, self._most_ghosts = int(self.nways * NEW), int(self.nways * GHOSTS)
        # of each index: slots of new experts and of the others, and keys that are remembered, the oldest first
        self._new = [OrderedDict[int, None]() for _ in range(geometry.nblocks)]
        self._proven = [OrderedDict[int, None]() for _ in range(geometry.nblocks)]
        self._ghosts = [OrderedDict[int, None]() for _ in range(geometry.nblocks)]
        self._key_of = [0] * geometry.slots

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        queues, nways = self._proven, self.nways
        for slot in slots:
            proven = queues[slot // nways]
            if slot in proven:
                proven.move_to_end(slot)

    def on_fill(self, slot: int, key: int) -> None:
        index = slot // self.nways
        self._enter(index, slot, key, self._recall(index, key))

    def on_evict(self, slot: int, key: int) -> None:
        index = slot // self.nways
        queue = self._new[index] if slot in self._new[index] else self._proven[index]
        del queue[slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        new, proven, ghosts = self._new[index], self._proven[index], self._ghosts[index]
        queues = (new, proven) if len(new) > self._most_new else (proven, new)
        for queue in queues:
            for slot in queue:
                if slot not in blocked:
                    recalled = self._recall(index, key)
                    del queue[slot]
                    if queue is new and self._most_ghosts:
                        ghosts[self._key_of[slot]] = None
                        if len(ghosts) > self._most_ghosts:
                            ghosts.popitem(last=False)
                    self._enter(index, slot, key, recalled)
                    return slot
        return None

    def _recall(self, index: int, key: int) -> bool:
        """Whether a key was remembered; it is no longer."""
        return self._ghosts[index].pop(key, self) is None

    def _enter(self, index: int, slot: int, key: int, recalled: bool) -> None:
        self._key_of[slot] = key
        (self._proven if recalled else self._new)[index][slot] = None
