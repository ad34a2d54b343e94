"""Segmented LRU: an expert climbs a segment with each call, and falls when others push it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.policies.base import Policy

SEGMENTS = 4  # as libCacheSim has by default; an index of fewer ways is one


class Slru(Policy):
    """Karedla, Love and Wherry, Caching strategies to improve disk system performance, IEEE Computer, 1994.

    A call moves an expert to the next segment, whose oldest comes down if it is full; in the highest it becomes the
    newest. Evicts the oldest of the lowest segment that has one. The segments have a quarter of the ways each, the
    lowest what is left over; a new expert enters the lowest with room, so that a cache that fills uses all.
    """

    name = "SLRU"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry, seed)
        segments = SEGMENTS if self.nways >= SEGMENTS else 1
        share = self.nways // segments
        self._sizes = [self.nways - share * (segments - 1)] + [share] * (segments - 1)
        # of each index and segment, the lowest first: slots, the oldest first
        self._segments = [[OrderedDict[int, None]() for _ in self._sizes] for _ in range(geometry.nblocks)]
        self._number = [0] * geometry.slots  # the segment that each slot is in

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        nways, sizes, numbers = self.nways, self._sizes, self._number
        for slot in slots:
            segments, number = self._segments[slot // nways], numbers[slot]
            if number == len(sizes) - 1:
                segments[number].move_to_end(slot)
                continue
            here, above = segments[number], segments[number + 1]
            del here[slot]
            above[slot] = None
            numbers[slot] = number + 1
            if len(above) > sizes[number + 1]:
                pushed, _ = above.popitem(last=False)
                here[pushed] = None
                numbers[pushed] = number

    def on_fill(self, slot: int, key: int) -> None:
        for number, segment in enumerate(self._segments[slot // self.nways]):
            if len(segment) < self._sizes[number]:
                segment[slot] = None
                self._number[slot] = number
                return

    def on_evict(self, slot: int, key: int) -> None:
        del self._segments[slot // self.nways][self._number[slot]][slot]

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        for segment in self._segments[index]:
            for slot in segment:
                if slot not in blocked:
                    segment.move_to_end(slot)  # the only segment with room is the one that it leaves
                    return slot
        return None
