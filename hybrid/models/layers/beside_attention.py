"""A feed-forward beside attention: both read the residual stream before either is added to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from hybrid.models.layers.base import DeviceNeeds, Place, as_kind
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.ops import Op


@dataclass(frozen=True)
class EarlyAttention(GroupedQueryAttention):
    """Attention up to what heads attended to, rows for the projection that adds it."""

    @classmethod
    def of(cls, attention: GroupedQueryAttention) -> Self:
        """Attention beside which there is a feed-forward."""
        return as_kind(cls, attention)

    def ops(self, place: Place) -> Iterator[Op]:
        *early, _ = super().ops(place)
        yield from early

    def added(self, place: Place) -> Op:
        """The projection, whose result is added to the residual stream."""
        *_, last = super().ops(place)
        return last

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        """No device knows of what is beside it."""
        return None


@dataclass(frozen=True)
class BesideAttention(FeedForward):
    """It reads the rows that attention reads: its norm is the same tensor. What attention adds comes behind it."""

    attention: EarlyAttention = field(kw_only=True)

    @classmethod
    def of(cls, feed_forward: FeedForward, attention: EarlyAttention) -> Self:
        return as_kind(cls, feed_forward, attention=attention)

    def ops(self, place: Place) -> Iterator[Op]:
        yield from super().ops(place)
        yield self.attention.added(place)

    # No device computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of a feed-forward beside attention")
