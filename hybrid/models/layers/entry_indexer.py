"""The indexer of entries: a small attention of its own that says which of them a row sees, where there are many.

As the indexer of tokens (`indexer.py`), but a compressor of its own makes the keys, over the windows of the entries.
Heads may weigh the same, and queries be normed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from cpu_kernels import KEY_BLOCK
from hybrid.formats.block import round_up
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, Extents, Load, Place
from hybrid.models.layers.compressor import STORED, Compressor, compressor_format
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN
from hybrid.models.layers.indexer import MADE_QUERIES, QUERIES, SCORES, WEIGHTS
from hybrid.models.layers.products import BF16, FP32, NORMED_F32, gemm, product_cost, product_rows, score
from hybrid.models.layers.turning import Heads
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import PerHead, Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Op, State


@dataclass(frozen=True)
class EntryIndexerNames:
    """Names in a checkpoint. q: empty: the rows before those of the compressor's values. weights: of heads; empty: all
    weigh the same. norm: of queries; empty: there is none.
    """

    q: str = ""
    weights: str = ""
    norm: str = ""


@dataclass(frozen=True)
class EntryIndexer:
    """q_rank: of the rows that queries are made of. selects: how many entries a row sees at most. compressor: that of
    its keys.
    """

    heads: int
    q_rank: int
    selects: int
    compressor: Compressor
    names: EntryIndexerNames

    @property
    def head_dim(self) -> int:
        return self.compressor.dim

    @property
    def key_dim(self) -> int:
        """Of the keys as they are kept."""
        return round_up(self.head_dim, KEY_ALIGN)

    @property
    def key_bytes(self) -> int:
        """What the key of an entry takes."""
        return self.key_dim * BF16

    @property
    def width(self) -> int:
        """Of the queries of all heads."""
        return self.heads * self.head_dim

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module), compressor=self.compressor.inside(module))

    def checkpoint_shapes(self, place: Place) -> Shapes:
        names = in_layer(self.names, place.layer)
        if names.q:
            yield names.q, (self.width, self.q_rank)
        if names.weights:
            yield names.weights, (self.heads, place.hidden)
        if names.norm:
            yield names.norm, (self.head_dim,)
        yield from self.compressor.checkpoint_shapes(place)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, format = in_layer(self.names, place.layer), compressor_format(place.mix)
        yield from self.compressor.store_tensors(place, shard)
        queries = names.q or self._before_values(place.layer)
        yield shard.matrix("indexer.q", STORED, Stacked((queries,)), format, self.width, self.q_rank)
        if names.weights:
            yield shard.floats("indexer.weights", STORED, Stacked((names.weights,)), self.heads, place.hidden)
        if names.norm:
            yield shard.floats("indexer.q_norm", STORED, Stacked((names.norm,), plus=place.norm_plus), self.head_dim)

    def _before_values(self, layer: int) -> PerHead:
        compressor = self.compressor
        values, rows = in_layer(compressor.names, layer).values, compressor.others + compressor.width
        return PerHead(values, 1, rows, 0, self.width)

    def ops(self, place: Place, rope: Buffer | None, turned: RopeSpec | None, latents: str) -> Iterator[Op]:
        """Queries, weights of heads, and what every entry is worth. rope: the table of rows' angles, by which they turn
        as `turned` says. latents: the rows that queries are made of.
        """
        format, prefix, stride = compressor_format(place.mix), f"layers.{place.layer}.indexer", row_stride(self.width)
        yield gemm(PART, format, latents, f"{prefix}.q", MADE_QUERIES, self.width, self.q_rank, stride)
        if self.names.weights:
            yield score(PART, f"{prefix}.weights", WEIGHTS, self.heads, place.hidden, "heads")
        heads = Heads(self.heads, self.head_dim, turned, rope, self.compressor.turns_first)
        norm = f"{prefix}.q_norm" if self.names.norm else ""
        yield heads.turn(place.layer, MADE_QUERIES, stride, QUERIES, self.key_dim, place.eps, norm=norm)
        scores = {
            "q": Buffer(QUERIES),
            "weights": Buffer(WEIGHTS) if self.names.weights else None,
            "scores": Buffer(SCORES),
            "kv": State(place.layer),
            "heads": self.heads,
            "rate": self.compressor.rate,
            "selects": self.selects,
        }
        yield Op("entry_scores", PART, scores, (1, "rows and key block"))

    def buffers(self, place: Place, extents: Extents, latents: str) -> dict[str, int]:
        rows, entries = extents.rows, extents.tokens // self.compressor.rate
        low, low_bytes = product_rows(latents, self.q_rank, compressor_format(place.mix))
        of_weights = {
            NORMED_F32: rows * row_stride(place.hidden) * FP32,
            WEIGHTS: rows * self.heads * FP32,
        }
        return {
            low.name: rows * low_bytes,
            **(of_weights if self.names.weights else {}),
            MADE_QUERIES: rows * row_stride(self.width) * FP32,
            QUERIES: rows * self.heads * self.key_dim * BF16,
            SCORES: rows * round_up(max(entries, 1), KEY_BLOCK) * FP32,
        }

    def cost(self, place: Place, load: Load) -> Cost:
        """Keys are read and scored where sequences have more entries than are seen."""
        total = product_cost(compressor_format(place.mix), self.width, self.q_rank, load.rows)
        weights, rate = self.heads * place.hidden * bool(self.names.weights), self.compressor.rate
        total += Cost(float(weights * FP32), 2.0 * weights * load.rows)
        if load.tokens <= self.selects * rate * load.sequences:
            return total
        return total + Cost(load.tokens / rate * self.key_bytes, 2.0 * load.pairs / rate * self.width)
