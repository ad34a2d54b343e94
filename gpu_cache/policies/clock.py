"""CLOCK: first in, first out, with a second chance for what was called."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from itertools import islice

from gpu_cache.policies.fifo import Fifo
from gpu_cache.policies.marked import MarkedPolicy


class Clock(MarkedPolicy, Fifo):
    """Corbato, A paging experiment with the Multics system, 1968; also called second chance or FIFO-reinsertion.

    Evicts what was filled longest ago if it was not called since; if it was, it goes around once more, unmarked. What
    is blocked is passed over and keeps its place and its mark.
    """

    name = "CLOCK"

    def on_fill(self, slot: int, key: int) -> None:
        super().on_fill(slot, key)
        self._called[slot] = 0

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        order = self._order[index]
        slot = first_uncalled(order, self._called, blocked)
        if slot is not None:
            order.move_to_end(slot)
        return slot


def first_uncalled(order: OrderedDict[int, None], calls: bytearray, blocked: Collection[int]) -> int | None:
    """The first slot without calls that may be evicted; those with calls go around, each time for one call less."""
    passed = 0  # blocked slots at the front
    while passed < len(order):
        slot = next(iter(order)) if not passed else next(islice(order, passed, None))
        if slot in blocked:
            passed += 1
        elif not calls[slot]:
            return slot
        else:
            calls[slot] -= 1
            order.move_to_end(slot)
    return None
