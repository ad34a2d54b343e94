"""An admission rule of your own: which misses are worth a copy. Change what is below, then

hybrid policy check my_rule.py
hybrid simulate --trace trace.csv --policy LRU --admission always,my_rule.py
hybrid run --device simulated --cache-admission my_rule.py --prompt "Hello"
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_cache.admission import Admission, Costs
from gpu_cache.geometry import Geometry


class MyRule(Admission):
    """Admits an expert from its second call on.

    A key is layer * experts + expert. What a hook is given is the table's: read it, do not keep or change it. Leave out
    the hooks that you do not need.
    """

    def __init__(self, geometry: Geometry, costs: Costs | None = None) -> None:
        """costs: seconds to copy an expert, and to compute it on the CPU and on the device; None if unknown."""
        self._calls = [0] * (geometry.layers * geometry.experts)  # of each key

    def on_step(self) -> None:
        """A step begins."""

    def on_call(self, keys: Sequence[int]) -> None:
        """A layer calls these experts."""
        for key in keys:
            self._calls[key] += 1

    def on_fill(self, index: int) -> None:
        """An expert is copied into a slot of an index."""

    def wants(self, index: int, key: int) -> bool:
        """Whether to copy a missed expert into its index. Called once for each miss, after `on_call`."""
        return self._calls[key] > 1
