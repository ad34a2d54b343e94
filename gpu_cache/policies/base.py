"""What the table tells a replacement policy and asks of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gpu_cache.geometry import Geometry


class Policy:
    """One object for the whole cache, with a state for each index. Slots and keys are as `Geometry` numbers them.

    The table leaves out hooks that a policy does not override. Order within a lookup: `on_call`, `on_hit` of every hit,
    then for each fill `victim`, if no slot of the index is empty, `on_evict` of what it returned, `on_fill`.
    """

    name = ""  # as the command line spells it; without one a class is only a base of others

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        self.nways = geometry.nways

    def on_step(self, step: int) -> None:
        """A step begins; layers are looked up in ascending order within it."""

    def on_call(self, layer: int, keys: Sequence[int], scores: Sequence[float] | None) -> None:
        """A layer asks for experts, resident or not. scores: the largest gate score of each; None: unknown."""

    def on_hit(self, slot: int, key: int) -> None:
        """An expert that was asked for is ready in a slot."""

    def on_fill(self, slot: int, key: int) -> None:
        """An expert is given a slot, which was empty, and its copy begins."""

    def on_evict(self, slot: int, key: int) -> None:
        """An expert leaves its slot: `victim` chose it, or its copy failed."""

    def victim(self, index: int, blocked: Collection[int]) -> int | None:
        """The slot of an index to evict, never one of `blocked` (pinned or loading); None if there is no other.

        Every slot of the index holds an expert. What is returned is evicted at once.
        """
        raise NotImplementedError
