"""The indexer of sparse attention: a small attention of its own that says which tokens a row attends to.

A row of more than `selects` tokens gives each of them a score, over all heads of the indexer the sum of
weight * max(0, query * key), and attends to those with the largest; of equal ones to the first. Queries are made of the
latents of attention's queries, keys of the residual stream: one for all heads, normed with a mean and a bias, kept in
bf16 beside those of attention. Weights are made in fp32, as those of a router. Factors that all scores share, and
rotations of queries and keys alike, choose nothing: there are none here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from cpu_kernels import KEY_BLOCK
from hybrid.formats import FORMATS
from hybrid.formats.block import round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, Extents, Load, Place, StateLayout
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN
from hybrid.models.layers.products import (
    BF16,
    FP32,
    NORMED,
    NORMED_F32,
    gemm,
    product_cost,
    product_rows,
    rows_buffers,
    score,
)
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor, bias_name, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight

# Buffers. MADE_...: by the projections; QUERIES: turned, a row for each head. SELECTED: positions, which layers behind
# it may see too.
MADE_QUERIES, MADE_KEYS, WEIGHTS = "index_made_queries", "index_made_keys", "index_weights"
QUERIES, SCORES, SELECTED = "index_queries", "index_scores", "selected"
KEY_EPS = 1e-6  # of the norm of keys, whatever config.json says of the others
STORED = "indexer"  # what its tensors count as


def index_format(mix: FormatMix) -> str:
    """Of the matrices of an indexer: that of attention, or what is like it with 8 bits where that has fewer: a score
    that is a little wrong may select another token. bf16 beside several formats.
    """
    names = set(matrix_formats(mix.attention, 1 + mix.attention.count("/")))
    name = names.pop()
    if names or FORMATS[name].rows == "wide":
        return "bf16"
    if FORMATS[name].rows == "grouped":
        return "q8_0"
    return "int8" if name == "int4" else name


def with_keys(rows: StateLayout, tokens: int, key_dim: int) -> StateLayout:
    """The state of attention with a key of so many dimensions of every token behind it."""
    key_bytes = key_dim * BF16
    return replace(
        rows,
        nbytes=rows.nbytes + tokens * key_bytes,
        token_bytes=rows.token_bytes + key_bytes,
        fields={**rows.fields, "index_offset": rows.nbytes, "index_dim": key_dim},
        runs=(*rows.runs, (rows.nbytes, tokens * key_bytes)),
    )


@dataclass(frozen=True)
class IndexerNames:
    """Names in a checkpoint. The norm has a bias."""

    q: str = "model.layers.{layer}.self_attn.indexer.wq_b.weight"
    k: str = "model.layers.{layer}.self_attn.indexer.wk.weight"
    k_norm: str = "model.layers.{layer}.self_attn.indexer.k_norm.weight"
    weights: str = "model.layers.{layer}.self_attn.indexer.weights_proj.weight"


@dataclass(frozen=True)
class Indexer:
    """q_rank: of the latents of queries. interleaved: whether dimensions turn pair by pair; they are the first ones, as
    many as turn in attention, and by the same angles.
    """

    heads: int
    head_dim: int
    q_rank: int
    interleaved: bool
    names: IndexerNames = field(default_factory=IndexerNames)

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
    def attended(self) -> dict[str, Buffer]:
        """What attention is told beside what is selected."""
        return {}

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    # Weights.

    def checkpoint_shapes(self, place: Place) -> Shapes:
        names = in_layer(self.names, place.layer)
        yield names.q, (self.width, self.q_rank)
        yield names.k, (self.head_dim, place.hidden)
        yield names.k_norm, (self.head_dim,)
        yield bias_name(names.k_norm), (self.head_dim,)
        yield names.weights, (self.heads, place.hidden)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, format, dim = in_layer(self.names, place.layer), self.format(place.mix), self.head_dim
        yield shard.matrix("indexer.q", STORED, Stacked((names.q,)), format, self.width, self.q_rank)
        yield shard.matrix("indexer.k", STORED, Stacked((names.k,)), format, dim, place.hidden)
        yield shard.floats("indexer.norm", STORED, Stacked((names.k_norm,)), dim)
        yield shard.floats("indexer.norm_bias", STORED, Stacked((names.k_norm,), biases=True), dim)
        yield shard.floats("indexer.weights", STORED, Stacked((names.weights,)), self.heads, place.hidden)

    def format(self, mix: FormatMix) -> str:
        return index_format(mix)

    # A step.

    def ops(self, place: Place, rope: Buffer, rope_dim: int, latents: str) -> Iterator[Op]:
        """From normed rows, of the kind of `format` and as fp32, to SCORES. rope: its table. latents: the rows of
        queries' latents.
        """
        format, prefix = self.format(place.mix), f"layers.{place.layer}.indexer"
        strides = row_stride(self.width), row_stride(self.head_dim)
        yield gemm(PART, format, latents, f"{prefix}.q", MADE_QUERIES, self.width, self.q_rank, strides[0])
        yield gemm(PART, format, NORMED, f"{prefix}.k", MADE_KEYS, self.head_dim, place.hidden, strides[1])
        yield score(PART, f"{prefix}.weights", WEIGHTS, self.heads, place.hidden, "heads")
        turned = {
            "queries": Buffer(MADE_QUERIES),
            "keys": Buffer(MADE_KEYS),
            "rope": rope,
            "norm": Weight(f"{prefix}.norm"),
            "norm_bias": Weight(f"{prefix}.norm_bias"),
            "q": Buffer(QUERIES),
            "kv": State(place.layer),
            "heads": self.heads,
            "head_dim": self.head_dim,
            "rope_dim": rope_dim,
            "interleaved": self.interleaved,
            "query_stride": strides[0],
            "key_stride": strides[1],
            "eps": KEY_EPS,
        }
        yield Op("index", PART, turned, (self.heads + 1, "heads a row"))

    def select(self, place: Place, selects: int, q: Buffer, query_stride: int) -> Iterator[Op]:
        """Scores, and the positions of the largest. q: queries of attention, [rows, query_stride] bf16."""
        scores = {
            "q": Buffer(QUERIES),
            "weights": Buffer(WEIGHTS),
            "scores": Buffer(SCORES),
            "kv": State(place.layer),
            "heads": self.heads,
            "selects": selects,
        }
        yield Op("index_scores", PART, scores, (1, "row and key block"))
        chosen = {
            "scores": Buffer(SCORES),
            "q": q,
            "selected": Buffer(SELECTED),
            "selects": selects,
            "query_stride": query_stride,
        }
        yield Op("select", PART, chosen, (0, "rows"))

    def state(self, rows: StateLayout, tokens: int) -> StateLayout:
        return with_keys(rows, tokens, self.key_dim)

    def buffers(self, place: Place, extents: Extents, latents: str) -> dict[str, int]:
        rows, format = extents.rows, self.format(place.mix)
        low, low_bytes = product_rows(latents, self.q_rank, format)
        return {
            low.name: rows * low_bytes,
            **rows_buffers(NORMED, place.hidden, format, rows),
            NORMED_F32: rows * row_stride(place.hidden) * FP32,
            MADE_QUERIES: rows * row_stride(self.width) * FP32,
            MADE_KEYS: rows * row_stride(self.head_dim) * FP32,
            WEIGHTS: rows * self.heads * FP32,
            QUERIES: rows * self.heads * self.key_dim * BF16,
            SCORES: rows * round_up(extents.tokens, KEY_BLOCK) * FP32,
        }

    def cost(self, place: Place, load: Load, selects: int) -> Cost:
        """Keys are read and scored where sequences have more than `selects` tokens."""
        format, rows = self.format(place.mix), load.rows
        total = product_cost(format, self.width, self.q_rank, rows)
        total += product_cost(format, self.head_dim, place.hidden, rows)
        weights = self.heads * place.hidden
        total += Cost(float(weights * FP32), 2.0 * weights * rows)
        if load.tokens <= selects * load.sequences:
            return total
        return total + Cost(float(load.tokens * self.key_bytes), 2.0 * load.pairs * self.width)
