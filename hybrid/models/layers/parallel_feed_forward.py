"""Experts, and beside them a dense feed-forward that reads the same residual stream.

Both have norms of their own, before and behind. What they make together is normed once more and added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from hybrid.formats.mix import FormatMix
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.products import FP32, add_normed, norm_shapes, norm_tensors
from hybrid.models.tensors import ExpertForm, Shapes, Shard, StoreTensor, in_layer
from hybrid.ops import Op

SUM = "feed_forward_sum"  # what the two make of the rows, each normed: float32 [rows, row_stride(hidden)]
DENSE_STORED = "dense"  # how the names of the dense one's tensors begin in a store


@dataclass(frozen=True)
class ParallelFeedForward(FeedForward):
    """The experts of the layer, whose names have the norm of the sum; `dense` is what is beside them. Both have a
    `post_norm`.
    """

    dense: FeedForward = field(kw_only=True)

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(super().inside(module), dense=self.dense.inside(module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        yield from self.dense.checkpoint_shapes(place, form)
        yield from super().checkpoint_shapes(place, form)
        yield from norm_shapes(place, in_layer(self.names, place.layer).sum_norm)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        yield from self.dense.store_tensors(place, shard)
        yield from super().store_tensors(place, shard)
        name = in_layer(self.names, place.layer).sum_norm
        yield from norm_tensors(place, shard.below(self.stored), "sum_norm", name)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return self.dense.formats(mix) + super().formats(mix)

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        yield from self.dense.first_ops(place)
        yield from super().first_ops(place)

    def ops(self, place: Place) -> Iterator[Op]:
        prefix, first = self.prefix(place), f"{self.dense.prefix(place)}.post_norm"
        yield from self.dense.own_ops(place)
        yield add_normed(place, "moe", first, target=SUM, adds=False)
        yield from self.own_ops(place)
        yield add_normed(place, "moe", f"{prefix}.post_norm", target=SUM)
        factor = f"{prefix}.factor" * bool(self.names.factor)
        yield add_normed(place, "moe", f"{prefix}.sum_norm", source=SUM, factor=factor)

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        both = self.dense.buffers(place, extents), super().buffers(place, extents)
        sizes = {name: max(some.get(name, 0) for some in both) for name in {**both[0], **both[1]}}
        return {**sizes, SUM: extents.rows * row_stride(place.hidden) * FP32}

    def cost(self, place: Place, load: Load) -> Cost:
        return self.dense.cost(place, load) + super().cost(place, load)

    # A device.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        """No device knows the norms."""
        return None
