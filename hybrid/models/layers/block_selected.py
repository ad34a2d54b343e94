"""Grouped-query attention to selected blocks of tokens: in long sequences a row sees those that an indexer chooses.

One of blocks chooses for each KV head, one of pools for all heads. Up to there it is grouped-query attention, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout, as_kind
from hybrid.models.layers.block_indexer import BlockIndexer
from hybrid.models.layers.grouped_query import GroupedQueryAttention
from hybrid.models.layers.pool_indexer import PoolIndexer
from hybrid.models.layers.products import NORMED
from hybrid.models.layers.rotary import rope_name
from hybrid.models.tensors import ExpertForm, Shapes, Shard, StoreTensor
from hybrid.ops import Buffer, Op


@dataclass(frozen=True)
class BlockSelectedAttention(GroupedQueryAttention):
    """It has a rope, and no window."""

    indexer: BlockIndexer | PoolIndexer = field(kw_only=True)

    @classmethod
    def of(cls, attention: GroupedQueryAttention, indexer: BlockIndexer | PoolIndexer) -> Self:
        """Grouped-query attention whose rows select."""
        return as_kind(cls, attention, indexer=indexer)

    def within(self, tokens: int) -> GroupedQueryAttention:  # type: ignore[override]
        """Without an indexer where no sequence is so long that rows select."""
        if tokens > self.indexer.tokens:
            return self
        return as_kind(GroupedQueryAttention, self)

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(super().inside(module), indexer=self.indexer.inside(module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        yield from super().checkpoint_shapes(place, form)
        yield from self.indexer.checkpoint_shapes(place)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        yield from super().store_tensors(place, shard)
        yield from self.indexer.store_tensors(place, shard)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().formats(mix), self.indexer.format(mix))))

    # A step.

    def _read_formats(self, place: Place) -> tuple[str, ...]:
        return (*super()._read_formats(place), self.indexer.format(place.mix))

    def first_ops(self, place: Place) -> Iterator[Op]:
        yield from super().first_ops(place)
        yield from self.indexer.first_ops(place)

    def ops(self, place: Place) -> Iterator[Op]:
        """The indexer works behind attention's own projections, and selects before attention looks at keys."""
        assert self.rope is not None
        rope, queries = Buffer(rope_name(place, self.rope)), self.heads * self.key_dim
        for op in super().ops(place):
            if op.kind == "qkv":
                yield from self.indexer.ops(place, rope, self.rope.dim, NORMED)
            if op.kind == "attention":
                yield from self.indexer.select(place, self.indexer.tokens, op.arguments["q"], queries)
                op = replace(op, arguments=op.arguments | self.indexer.attended)
            yield op

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return super().buffers(place, extents) | self.indexer.buffers(place, extents, NORMED)

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        """What the indexer keeps lies behind keys of all heads and their values."""
        return self.indexer.state(super().state(tokens, kv_format), tokens)

    def cost(self, place: Place, load: Load) -> Cost:
        seen = load.rows * self.indexer.tokens
        short = replace(load, tokens=min(load.tokens, seen), pairs=min(load.pairs, float(seen)))
        return super().cost(place, short) + self.indexer.cost(place, load, self.indexer.tokens)

    # On a device: none selects. Where no sequence is long enough for that, `within` is what it computes.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of attention to selected blocks")
