"""Interface of a replacement policy, called by the table."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry


class Policy:
    """One object for the whole cache, with a state for each index. Slots and keys are as `Geometry` numbers them.

    Few hooks that do much, because Python calls are slow: the table does not call hooks that are not overridden.
    Order within a lookup: `on_lookup`, then for each fill `on_fill` or `replace`.
    """

    name = ""  # as the command line spells it; without one a class is only a base of others

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        self.nways = geometry.nways

    def on_step(self, step: int) -> None:
        """A step begins; layers are looked up in ascending order within it."""

    def on_lookup(
        self, layer: int, experts: Sequence[int], scores: Sequence[float] | None, slots: Sequence[int]
    ) -> None:
        """A layer calls experts, resident or not. scores: the largest gate score of each; None: unknown.

        slots: of those that are ready, in the order of the experts.
        """

    def on_fill(self, slot: int, key: int) -> None:
        """An expert is given a slot that was empty, and its copy begins."""

    def on_evict(self, slot: int, key: int) -> None:
        """The copy of an expert failed: its slot is empty again."""

    def replace(self, index: int, key: int, blocked: Collection[int]) -> int | None:
        """Evict an expert of an index and give its slot to `key`, whose copy begins; returns the slot.

        It is never one of `blocked` (pinned or loading); None if there is no other, and nothing is evicted. Every slot
        of the index holds an expert.
        """
        raise NotImplementedError
