"""The indexer of attention to blocks: it says which blocks of keys each KV head of a row sees.

Every head of the indexer belongs to a KV head. A block is worth the largest product of the head's query and the keys in
it; a row of more than `selects` blocks sees its own, which is the last, and of those before it the ones that are worth
most; of equal ones the first. Queries and keys are made of the rows that attention reads, normed per head, turned as
those of attention; there is one key for all heads, kept in bf16 beside those of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from cpu_kernels import INDEX_BLOCK, KEY_BLOCK
from hybrid.formats.block import round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, Extents, Load, Place, StateLayout
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN
from hybrid.models.layers.indexer import (
    MADE_KEYS,
    MADE_QUERIES,
    QUERIES,
    SCORES,
    SELECTED,
    STORED,
    index_format,
    with_keys,
)
from hybrid.models.layers.products import BF16, FP32, NORMED, gemm, product_cost, rows_buffers
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight


@dataclass(frozen=True)
class BlockIndexerNames:
    """Names in a checkpoint."""

    q: str = "model.layers.{layer}.self_attn.index_q_proj.weight"
    k: str = "model.layers.{layer}.self_attn.index_k_proj.weight"
    q_norm: str = "model.layers.{layer}.self_attn.index_q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.index_k_norm.weight"


@dataclass(frozen=True)
class BlockIndexer:
    """heads: as many as KV heads. selects: blocks of INDEX_BLOCK tokens, the row's own among them. interleaved: whether
    dimensions turn pair by pair; they are the first ones, by the angles of attention.
    """

    heads: int
    head_dim: int
    selects: int
    interleaved: bool = False
    names: BlockIndexerNames = field(default_factory=BlockIndexerNames)

    @property
    def key_dim(self) -> int:
        """Of the keys as they are kept."""
        return round_up(self.head_dim, KEY_ALIGN)

    @property
    def key_bytes(self) -> int:
        """What the key of one token takes."""
        return self.key_dim * BF16

    @property
    def width(self) -> int:
        """Of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Up to so many tokens a row sees all."""
        return self.selects * INDEX_BLOCK

    @property
    def attended(self) -> dict[str, Any]:
        """What attention is told of what is selected."""
        return {"blocks": Buffer(SELECTED), "block_count": self.selects}

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    # Weights.

    def checkpoint_shapes(self, place: Place) -> Shapes:
        names = in_layer(self.names, place.layer)
        yield names.q, (self.width, place.hidden)
        yield names.k, (self.head_dim, place.hidden)
        yield names.q_norm, (self.head_dim,)
        yield names.k_norm, (self.head_dim,)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, format, dim = in_layer(self.names, place.layer), index_format(place.mix), self.head_dim
        yield shard.matrix("indexer.q", STORED, Stacked((names.q,)), format, self.width, place.hidden)
        yield shard.matrix("indexer.k", STORED, Stacked((names.k,)), format, dim, place.hidden)
        yield shard.floats("indexer.q_norm", STORED, Stacked((names.q_norm,), plus=place.norm_plus), dim)
        yield shard.floats("indexer.norm", STORED, Stacked((names.k_norm,), plus=place.norm_plus), dim)

    def format(self, mix: FormatMix) -> str:
        return index_format(mix)

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def ops(self, place: Place, rope: Buffer, rope_dim: int, latents: str) -> Iterator[Op]:
        """From normed rows of the kind of `format` to queries and keys. rope: its table. latents: the rows that queries
        are made of.
        """
        format, prefix = index_format(place.mix), f"layers.{place.layer}.indexer"
        strides = row_stride(self.width), row_stride(self.head_dim)
        yield gemm(PART, format, latents, f"{prefix}.q", MADE_QUERIES, self.width, place.hidden, strides[0])
        yield gemm(PART, format, NORMED, f"{prefix}.k", MADE_KEYS, self.head_dim, place.hidden, strides[1])
        turned = {
            "queries": Buffer(MADE_QUERIES),
            "keys": Buffer(MADE_KEYS),
            "rope": rope,
            "norm": Weight(f"{prefix}.norm"),
            "norm_bias": None,
            "query_norm": Weight(f"{prefix}.q_norm"),
            "q": Buffer(QUERIES),
            "kv": State(place.layer),
            "heads": self.heads,
            "head_dim": self.head_dim,
            "rope_dim": rope_dim,
            "interleaved": self.interleaved,
            "query_stride": strides[0],
            "key_stride": strides[1],
            "eps": place.eps,
        }
        yield Op("index", PART, turned, (self.heads + 1, "heads a row"))

    def select(self, place: Place, selects: int, q: Buffer, query_stride: int) -> Iterator[Op]:
        """What blocks are worth, and those that are worth most. selects: tokens. q: queries of attention,
        [rows, query_stride] bf16.
        """
        blocks = selects // INDEX_BLOCK
        scores = {
            "q": Buffer(QUERIES),
            "scores": Buffer(SCORES),
            "kv": State(place.layer),
            "heads": self.heads,
            "selects": blocks,
        }
        yield Op("block_scores", PART, scores, (1, "row and key block"))
        chosen = {
            "scores": Buffer(SCORES),
            "q": q,
            "selected": Buffer(SELECTED),
            "heads": self.heads,
            "selects": blocks,
            "query_stride": query_stride,
        }
        yield Op("select_blocks", PART, chosen, (0, "rows"))

    def state(self, rows: StateLayout, tokens: int) -> StateLayout:
        return with_keys(rows, tokens, self.key_dim)

    def buffers(self, place: Place, extents: Extents, latents: str) -> dict[str, int]:
        rows, blocks = extents.rows, round_up(extents.tokens, KEY_BLOCK) // INDEX_BLOCK
        return {
            **rows_buffers(NORMED, place.hidden, index_format(place.mix), rows),
            MADE_QUERIES: rows * row_stride(self.width) * FP32,
            MADE_KEYS: rows * row_stride(self.head_dim) * FP32,
            QUERIES: rows * self.heads * self.key_dim * BF16,
            SCORES: rows * self.heads * blocks * FP32,
            SELECTED: rows * self.heads * self.selects * FP32,
        }

    def cost(self, place: Place, load: Load, selects: int) -> Cost:
        """Keys are read and multiplied where sequences have more than `selects` tokens."""
        format, rows = index_format(place.mix), load.rows
        total = product_cost(format, self.width, place.hidden, rows)
        total += product_cost(format, self.head_dim, place.hidden, rows)
        if load.tokens <= selects * load.sequences:
            return total
        return total + Cost(float(load.tokens * self.key_bytes), 2.0 * load.pairs * self.width)
