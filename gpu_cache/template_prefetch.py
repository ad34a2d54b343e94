"""A prefetch of your own: which experts are copied before they are called. Change what is below, then

hybrid policy check my_rule.py
hybrid simulate --trace trace.csv --policy LRU --prefetch none,my_rule.py,my_rule.py:3
hybrid run --device simulated --cache-prefetch my_rule.py --prompt "Hello"
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from gpu_cache.geometry import Geometry
from gpu_cache.prefetch import Prefetch


class MyRule(Prefetch):
    """Names the experts that followed when each of those that are called was called the last time.

    It looks `depth` lookups ahead: 1 of `my_rule.py`, 3 of `my_rule.py:3`. After the last layer comes the first one.
    """

    def __init__(self, geometry: Geometry, depth: int = 1) -> None:
        super().__init__(geometry, depth)  # sets self.layers, self.experts and self.depth
        self._followed: dict[int, list[int]] = {}  # of a key, layer * experts + expert: what was called after it
        self._waiting = deque[tuple[int, list[int]]]()  # the layer ahead of a lookup, and its keys

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        """A layer calls these experts. Called after every lookup, and of calls that teach the rule before a replay.

        What it is given is the table's: read it, do not keep or change it.
        """
        if len(self._waiting) == self.depth:
            ahead, before = self._waiting.popleft()
            if ahead == layer:  # no layer was left out in between
                self._followed.update((key, list(experts)) for key in before)
        self._waiting.append((self.ahead(layer), self._keys(layer, experts)))

    def choose(self, layer: int, experts: Sequence[int]) -> Sequence[int]:
        """Of a layer that calls these experts: those that the layer `self.ahead(layer)` should have, the surest first.

        Called after `learn`, and alone where other calls have taught the rule. It changes nothing.
        """
        keys = self._keys(layer, experts)
        return list(dict.fromkeys(expert for key in keys for expert in self._followed.get(key, ())))

    def _keys(self, layer: int, experts: Sequence[int]) -> list[int]:
        return [layer * self.experts + expert for expert in experts]
