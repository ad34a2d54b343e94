"""The indexer of pools: it says which runs of tokens a row attends to, beside those of the run that has not ended.

Every `rate` tokens are a pool, from the first token of a sequence on. A compressor makes its key of the keys of its
tokens: of GLM-5.3 by gates, each normed before with a mean and a bias, and none of them turn; of Qwen3.8 their plain
mean, normed, and turned as the first of them. A row of more than `selects` ended pools attends to the tokens of those
that are worth most to it, of equal ones the first, and to the last tokens, which are in no ended pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

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
from hybrid.models.layers.rotary import windows_name, windows_ops
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor
from hybrid.ops import Buffer, Op

COUNTS = "selected_counts"  # buffer: how many tokens each row attends to, 0: all


@dataclass(frozen=True)
class PoolIndexer:
    """entries: the indexer of which pools are the entries. rope: of queries and keys; None: nothing turns."""

    entries: EntryIndexer
    rope: RopeSpec | None = None

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
        return row_stride(self.compressor.columns)

    @property
    def attended(self) -> dict[str, Any]:
        """What attention is told of what is selected."""
        return {"selected": Buffer(SELECTED), "selects": self.tokens, "counts": Buffer(COUNTS)}

    def inside(self, module: str) -> Self:
        return replace(self, entries=self.entries.inside(module))

    # Weights.

    def checkpoint_shapes(self, place: Place) -> Shapes:
        yield from self.entries.checkpoint_shapes(place)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        matrix, format = Stacked(self.compressor.sources(place.layer)), self.format(place.mix)
        yield shard.matrix("indexer.in", STORED, matrix, format, self.compressor.columns, place.hidden)
        yield from self.entries.store_tensors(place, shard)

    def format(self, mix: FormatMix) -> str:
        return compressor_format(mix)

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        """The angles of the first tokens of pools."""
        if self.rope:
            yield from windows_ops(place, self.rope, self.compressor.rate)

    def ops(self, place: Place, rope: Buffer | None, rope_dim: int, latents: str) -> Iterator[Op]:
        """From normed rows, of the kind of `format` and as fp32 if heads have weights, to SCORES. rope: the table of
        rows' angles, for `rope_dim` dimensions. latents: the rows that queries are made of.
        """
        own = self.rope.dim if self.rope else 0
        assert rope_dim == own, f"{own} dimensions of an indexer of pools turn, and it is given {rope_dim}"
        format, width, compressor = self.format(place.mix), self.brought_width, self.compressor
        source, windows = f"layers.{place.layer}.indexer.in", Buffer(self._windows(place)) if self.rope else None
        yield gemm(PART, format, NORMED, source, BROUGHT, compressor.columns, place.hidden, width)
        if compressor.names.token_norm:
            yield compressor.norm_tokens(place, 0, width, KEY_EPS)
        yield compressor.compress(place, windows, self.rope, 0, width, indexes=True)
        yield keep(place, BROUGHT, compressor.tokens, width)
        yield from self.entries.ops(place, rope, self.rope, latents)

    def _windows(self, place: Place) -> str:
        assert self.rope
        return windows_name(place, self.rope, self.compressor.rate)

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
        windows = {self._windows(place): rows * self.rope.dim * FP32} if self.rope else {}
        return {
            **rows_buffers(NORMED, place.hidden, self.format(place.mix), rows),
            **self.entries.buffers(place, extents, latents),
            **windows,
            BROUGHT: rows * self.brought_width * FP32,
            SELECTED: rows * self.tokens * 4,
            COUNTS: rows * 4,
        }

    def cost(self, place: Place, load: Load, selects: int) -> Cost:
        """Keys are read and scored where sequences have more pools than are selected."""
        brought = product_cost(self.format(place.mix), self.compressor.columns, place.hidden, load.rows)
        return brought + self.entries.cost(place, load)
