"""Which replica a request is for: the one that knows what it begins with, unless that one is too busy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from hybrid.cluster.prefixes import Prefix

LEAD = 4  # requests that a replica may have more than the least busy one, for a request that it knows all of
_MARKS = 1 << 18  # that are remembered; a long conversation has a hundred


class Affinity:
    """Remembers by which replica each prefix was read last. It is a hint: when it is lost, prompts are read anew."""

    def __init__(self, capacity: int = _MARKS) -> None:
        self._capacity = capacity
        self._readers: OrderedDict[bytes, str] = OrderedDict()  # by mark, the longest unused first
        self._turns: dict[str, int] = {}  # when each replica was chosen last
        self._turn = 0

    def order(self, prefix: Prefix, loads: Mapping[str, int]) -> list[str]:
        """The replicas, the best first. loads: requests that each of them has.

        Who has read a part of the prefix may have as much more than the least busy one as that part allows. Among
        equals the one comes first that was chosen the longest ago.
        """
        ordered = sorted(loads, key=lambda name: (loads[name], self._turns.get(name, 0)))
        reader, share = self._reader(prefix, loads)
        if reader is not None and loads[reader] <= loads[ordered[0]] + int(LEAD * share):
            ordered.remove(reader)
            ordered.insert(0, reader)
        return ordered

    def note(self, prefix: Prefix, replica: str) -> None:
        """The replica was chosen, and will have read all of the prefix."""
        self._turn += 1
        self._turns[replica] = self._turn
        for mark in prefix.marks:
            self._readers[mark] = replica
            self._readers.move_to_end(mark)
        while len(self._readers) > self._capacity:
            self._readers.popitem(last=False)

    def keep(self, replicas: set[str]) -> None:
        """Only these are there now."""
        self._turns = {name: turn for name, turn in self._turns.items() if name in replicas}

    def _reader(self, prefix: Prefix, loads: Mapping[str, int]) -> tuple[str | None, float]:
        """Who has read the most of the prefix among those that are there, and what share that is."""
        for mark, size in zip(reversed(prefix.marks), reversed(prefix.sizes), strict=True):
            reader = self._readers.get(mark)
            if reader in loads:
                return reader, size / prefix.sizes[-1]
        return None, 0.0
