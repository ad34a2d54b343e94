"""Latent attention to selected tokens (DSA): of a longer sequence, a row sees the `selects` that an indexer chooses.

Up to there it is latent attention, bit for bit. A layer without an indexer of its own sees what the last one before it
with an indexer selected. An indexer of pools selects several tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from hybrid.formats.mix import FormatMix
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout, as_kind
from hybrid.models.layers.indexer import SELECTED, Indexer
from hybrid.models.layers.latent import LOW_QUERIES, LatentAttention
from hybrid.models.layers.pool_indexer import PoolIndexer
from hybrid.models.layers.products import FP32
from hybrid.models.tensors import ExpertForm, Shapes, Shard, StoreTensor
from hybrid.ops import Buffer, Op


@dataclass(frozen=True)
class IndexedAttention(LatentAttention):
    """selects: tokens at most. indexer: None in layers that select what one before them did."""

    selects: int = field(kw_only=True)
    indexer: Indexer | PoolIndexer | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, attention: LatentAttention, selects: int, indexer: Indexer | PoolIndexer | None) -> Self:
        """Latent attention whose rows select."""
        return as_kind(cls, attention, selects=selects, indexer=indexer)

    def within(self, tokens: int) -> LatentAttention:
        """Without an indexer where no sequence is so long that rows select."""
        if tokens > self.selects:
            return self
        return as_kind(LatentAttention, self)

    # Weights.

    def inside(self, module: str) -> Self:
        plain = super().inside(module)
        return replace(plain, indexer=self.indexer.inside(module)) if self.indexer else plain

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        yield from super().checkpoint_shapes(place, form)
        if self.indexer:
            yield from self.indexer.checkpoint_shapes(place)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        yield from super().store_tensors(place, shard)
        if self.indexer:
            yield from self.indexer.store_tensors(place, shard)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        own = (self.indexer.format(mix),) if self.indexer else ()
        return tuple(dict.fromkeys((*super().formats(mix), *own)))

    # A step.

    def _norm_rows(self, place: Place, *formats: str, f32: bool = False) -> Op:
        if not self.indexer:
            return super()._norm_rows(place, *formats, f32=f32)
        return super()._norm_rows(place, *formats, self.indexer.format(place.mix), f32=True)

    def _norm_queries(self, place: Place, *formats: str) -> Op:
        return super()._norm_queries(place, *formats, *((self.indexer.format(place.mix),) if self.indexer else ()))

    def ops(self, place: Place) -> Iterator[Op]:
        """The indexer works behind attention's own projections, and selects before attention looks at keys."""
        for op in super().ops(place):
            if op.kind == "latent" and self.indexer:
                yield from self.indexer.ops(place, op.arguments["rope"], self.shared_dim, LOW_QUERIES)
            if op.kind == "attention":
                if self.indexer:
                    yield from self.indexer.select(place, self.selects, op.arguments["q"], self.heads * self.key_dim)
                    op = replace(op, arguments=op.arguments | self.indexer.attended)
                op = replace(op, arguments=op.arguments | {"selected": Buffer(SELECTED), "selects": self.selects})
            yield op

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        sizes = super().buffers(place, extents) | {SELECTED: extents.rows * self.selects * FP32}
        return sizes | self.indexer.buffers(place, extents, LOW_QUERIES) if self.indexer else sizes

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        rows = super().state(tokens, kv_format)
        return self.indexer.state(rows, tokens) if self.indexer else rows

    def cost(self, place: Place, load: Load) -> Cost:
        seen = load.rows * self.selects
        plain = super().cost(place, replace(load, tokens=min(load.tokens, seen), pairs=min(load.pairs, float(seen))))
        return plain + self.indexer.cost(place, load, self.selects) if self.indexer else plain

    # On a device: none selects. Where no sequence is long enough for that, `within` is what it computes.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of attention to selected tokens")
