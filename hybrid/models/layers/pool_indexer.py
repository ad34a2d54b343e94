"""The indexer of pools: it says which runs of tokens a row attends to, beside those of the run that has not ended.

Every `rate` tokens are a pool, from the first token of a sequence on. A compressor makes its key of the keys of its
tokens, each normed with a mean and a bias; none of them turn. A row of more than `selects` ended pools attends to the
tokens of those that are worth most to it, of equal ones the first, and to the last tokens, which are in no ended pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from cpu_kernels import RUN_TOKENS
from hybrid.formats.block import round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, Extents, Load, Place, StateLayout
from hybrid.models.layers.compressed_state import LINE
from hybrid.models.layers.compressor import BROUGHT, Compressor, compressor_format, keep
from hybrid.models.layers.entry_indexer import EntryIndexer
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.indexer import KEY_EPS, SCORES, SELECTED, STORED
from hybrid.models.layers.products import FP32, NORMED, gemm, product_cost, rows_buffers
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor
from hybrid.ops import Buffer, Op

COUNTS = "selected_counts"  # buffer: how many tokens each row attends to, 0: all


@dataclass(frozen=True)
class PoolIndexer:
    """entries: the indexer of which pools are the entries."""

    entries: EntryIndexer

    @property
    def compressor(self) -> Compressor:
        return self.entries.compressor

    @property
    def tokens(self) -> int:
        """Most that a row sees if it selects; up to so many it sees all."""
        return (self.entries.selects + 1) * self.compressor.rate - 1

    @property
    def brought_width(self) -> int:
        """What a token brings to its pool, key and gates, padded."""
        return row_stride(2 * self.compressor.width)

    @property
    def attended(self) -> dict[str, Buffer]:
        """What attention is told beside what is selected."""
        return {"counts": Buffer(COUNTS)}

    def inside(self, module: str) -> Self:
        return replace(self, entries=self.entries.inside(module))

    # Weights.

    def checkpoint_shapes(self, place: Place) -> Shapes:
        yield from self.entries.checkpoint_shapes(place)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        matrix, format = Stacked(self.compressor.sources(place.layer)), self.format(place.mix)
        yield shard.matrix("indexer.in", STORED, matrix, format, 2 * self.compressor.width, place.hidden)
        yield from self.entries.store_tensors(place, shard)

    def format(self, mix: FormatMix) -> str:
        return compressor_format(mix)

    # A step.

    def ops(self, place: Place, rope: Buffer | None, rope_dim: int, latents: str) -> Iterator[Op]:
        """From normed rows, of the kind of `format` and as fp32, to SCORES. latents: the rows of queries' latents."""
        assert not rope_dim, f"an indexer of pools turns nothing, and is given {rope_dim} dimensions that {rope} turns"
        format, width, compressor = self.format(place.mix), self.brought_width, self.compressor
        source = f"layers.{place.layer}.indexer.in"
        yield gemm(PART, format, NORMED, source, BROUGHT, 2 * compressor.width, place.hidden, width)
        yield compressor.norm_tokens(place, 0, width, KEY_EPS)
        yield compressor.compress(place, None, None, 0, width, indexes=True)
        yield keep(place, BROUGHT, compressor.tokens, width)
        yield from self.entries.ops(place, None, None, latents)

    def select(self, place: Place, selects: int, q: Buffer, query_stride: int) -> Iterator[Op]:
        """The positions of the tokens that rows attend to. q: queries of attention, [rows, query_stride] bf16."""
        chosen = {
            "scores": Buffer(SCORES),
            "q": q,
            "selected": Buffer(SELECTED),
            "counts": Buffer(COUNTS),
            "rate": self.compressor.rate,
            "selects": self.entries.selects,
            "stride": selects,
            "query_stride": query_stride,
        }
        yield Op("select_pools", PART, chosen, (0, "rows"))

    def state(self, rows: StateLayout, tokens: int) -> StateLayout:
        """Behind the rows of attention lie the keys of pools, and what the last tokens brought: a sequence goes back
        within a run alone, so that a step that failed cannot be run again.
        """
        keys = tokens // self.compressor.rate * self.entries.key_bytes
        tail, kept = rows.nbytes + keys, self.compressor.tokens * self.brought_width * FP32
        places = {"index_offset": rows.nbytes, "index_dim": self.entries.key_dim, "tail_offset": tail}
        return replace(
            rows,
            nbytes=tail + round_up(kept, LINE),
            token_bytes=tail // tokens,
            fields={**rows.fields, **places},
            runs=(*rows.runs, (rows.nbytes, keys)),
            run=RUN_TOKENS,
            fixed=((tail, kept),),
        )

    def buffers(self, place: Place, extents: Extents, latents: str) -> dict[str, int]:
        rows = extents.rows
        return {
            **rows_buffers(NORMED, place.hidden, self.format(place.mix), rows),
            **self.entries.buffers(place, extents, latents),
            BROUGHT: rows * self.brought_width * FP32,
            COUNTS: rows * 4,
        }

    def cost(self, place: Place, load: Load, selects: int) -> Cost:
        """Keys are read and scored where sequences have more pools than are selected."""
        brought = product_cost(self.format(place.mix), 2 * self.compressor.width, place.hidden, load.rows)
        return brought + self.entries.cost(place, load)
