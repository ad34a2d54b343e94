"""Adaptive replacement: how much recency counts, and how much frequency, is learnt from what was evicted too early."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

Queue = OrderedDict[int, None]


class _Lists:
    """Of an index, the oldest first. once, often: slots of what was called once since it came, or more often (T1 and T2
    of the paper); once_left, often_left: keys of what left them (B1 and B2). target: of the length of `once` (p).
    """

    def __init__(self) -> None:
        self.once, self.often, self.once_left, self.often_left = Queue(), Queue(), Queue(), Queue()
        self.target = 0.0


class Arc(Policy):
    """Megiddo and Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003.

    The lists are as long as an index has ways, those of keys too. What is blocked is passed over; where that leaves a
    list without a victim, the other gives one.
    """

    name = "ARC"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        self._lists = [_Lists() for _ in range(geometry.nblocks)]
        self._key_of = [0] * geometry.slots

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        nways = self.nways
        for slot in slots:
            lists = self._lists[slot // nways]
            if slot in lists.often:
                lists.often.move_to_end(slot)
            else:
                del lists.once[slot]
                lists.often[slot] = None

    def on_fill(self, slot: int, key: int) -> None:
        lists = self._lists[slot // self.nways]
        self._enter(lists, slot, key, key in lists.once_left or key in lists.often_left)

    def on_evict(self, slot: int, key: int) -> None:
        lists = self._lists[slot // self.nways]
        del (lists.often if slot in lists.often else lists.once)[slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        lists = self._lists[index]
        once_left, often_left, target = lists.once_left, lists.often_left, lists.target
        back = key in once_left or key in often_left
        if key in once_left:
            target = min(self.nways, target + max(1, len(often_left) / len(once_left)))
        elif key in often_left:
            target = max(0, target - max(1, len(once_left) / len(often_left)))
        first = len(lists.once) > target or (key in often_left and len(lists.once) == target)
        queues = [(lists.once, once_left), (lists.often, often_left)]
        for queue, left in queues if first else reversed(queues):
            for slot in queue:
                if slot not in blocked:
                    lists.target = target
                    del queue[slot]
                    left[self._key_of[slot]] = None
                    self._enter(lists, slot, key, back)
                    return slot
        return None

    def _enter(self, lists: _Lists, slot: int, key: int, back: bool) -> None:
        """Put an expert into its list, and forget what is too much. back: whether its key was remembered."""
        self._key_of[slot] = key
        once, often, once_left, often_left = lists.once, lists.often, lists.once_left, lists.often_left
        if back:
            once_left.pop(key, None)
            often_left.pop(key, None)
            often[slot] = None
        else:
            once[slot] = None
        while once_left and len(once) + len(once_left) > self.nways:
            once_left.popitem(last=False)
        while often_left and len(once) + len(often) + len(once_left) + len(often_left) > 2 * self.nways:
            often_left.popitem(last=False)
