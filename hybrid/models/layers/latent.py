"""Latent attention (MLA): all heads share one row a token, from which each makes its own keys and values.

The row is a normed latent followed by dimensions that turn. It is stored once, in the form of a key of grouped-query
attention, and a head never makes the keys and values of old tokens: its matrix for keys multiplies the query instead,
and its matrix for values what attention made of the latents. So heads are queries of one KV head whose values are the
first dimensions of its keys. int8 and fp8 have a float32 scale for each token: [rows | scales].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels import KEY_BLOCK
from hybrid.formats.block import BLOCK
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats, packed_bytes
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.grouped_query_shape import SCALE, STATE_EXTRA
from hybrid.models.layers.latent_names import LatentFormats, LatentNames
from hybrid.models.layers.latent_shape import LatentShape
from hybrid.models.layers.older_tokens import ENDS, NEW_KV, STATES, ops_for_older
from hybrid.models.layers.products import (
    BF16,
    FP32,
    NORMED,
    RESIDUAL,
    gemm,
    norm,
    norm_outputs,
    norm_shapes,
    norm_tensors,
    operations,
    product_cost,
    product_rows,
    quantise,
    rows_buffers,
    rows_name,
)
from hybrid.models.layers.rotary import growth_fields, rope_buffers, rope_constants, rope_name, rope_ops
from hybrid.models.layers.side_by_side import Joined, Piece, joined, joined_gemms, joined_tensors
from hybrid.models.tensors import ExpertForm, PerHead, Shapes, Shard, Stacked, StoreTensor, bias_name, in_layer, inside
from hybrid.ops import Buffer, Choice, Op, State, Weight

# Buffers. LOW: what the first projection makes. QUERIES: of all heads, as projected. PLAIN: their part that does not
# turn, a row for each head. ABSORBED: queries of latents. MIXED: what attention makes of latents, a row for each head.
LOW, QUERIES, LOW_QUERIES, PLAIN, ABSORBED, MIXED = "low", "queries", "low_queries", "plain", "absorbed", "mixed"
ATTENDED = "attended"
LATENT_EPS = 1e-6  # of the norms of latents, in most models
MAX_KEY_DIM = 1024  # of what the kernels hold
PER_HEAD_FORMATS = ("bf16", "int8", "int4")  # which any matrix can be packed to


@dataclass(frozen=True)
class LatentAttention(LatentShape):
    """scale: of the scores. bias: of the projections to latents, and of the output. latent_eps: of the norms of
    latents, whatever config.json says of the others.
    """

    scale: float
    bias: bool = False
    names: LatentNames = field(default_factory=LatentNames)
    latent_eps: float = LATENT_EPS

    def within(self, tokens: int) -> LatentAttention:
        return self

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden = in_layer(self.names, place.layer), place.hidden
        yield from norm_shapes(place, names.norm)
        low = tuple(zip(self._low_names(names), self.low_parts, strict=True))
        for name, shape in (*((name, (rows, hidden)) for name, rows in low), (names.out, (hidden, self.width))):
            yield name, shape
            if self.bias:
                yield bias_name(name), shape[:1]
        if self.q_rank:
            yield names.q_norm, (self.q_rank,)
            yield names.q_up, (self.query_width, self.q_rank)
        yield names.kv_norm, (self.rank,)
        yield names.kv_up, (self.heads * (self.nope_dim + self.value_dim), self.rank)

    def _low_names(self, names: LatentNames) -> tuple[str, str]:
        return names.q_down if self.q_rank else names.q, names.kv_down

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, formats, hidden = in_layer(self.names, place.layer), self._formats(place.mix), place.hidden
        yield from norm_tensors(place, shard, "attention.norm", names.norm)
        yield from joined_tensors(self._low(place), "attention", PART, shard, hidden, self.bias)
        if self.q_rank:
            yield shard.floats("attention.q_norm", "norms", Stacked((names.q_norm,)), self.q_rank)
            up = Stacked((names.q_up,))
            yield shard.matrix("attention.q_up", PART, up, formats.q_up, self.query_width, self.q_rank, (2,))
        yield shard.floats("attention.kv_norm", "norms", Stacked((names.kv_norm,)), self.rank)
        of_head = self.nope_dim + self.value_dim
        keys = PerHead(names.kv_up, self.heads, of_head, 0, self.nope_dim, turned=True, whole=names.keys)
        values = PerHead(names.kv_up, self.heads, of_head, self.nope_dim, self.value_dim, whole=names.values)
        yield shard.per_head("attention.keys", PART, keys, formats.keys, self.rank, self.nope_dim, 0)
        yield shard.per_head("attention.values", PART, values, formats.values, self.value_dim, self.rank, 1)
        last = (3 if self.q_rank else 2,)
        yield shard.matrix("attention.out", PART, Stacked((names.out,)), formats.out, hidden, self.width, last)
        if self.bias:
            yield shard.bias("attention.out_bias", PART, (names.out,), hidden)

    def _formats(self, mix: FormatMix) -> LatentFormats:
        q_low, kv_low, *up, out = matrix_formats(mix.attention, 4 if self.q_rank else 3)
        keys, values = matrix_formats(mix.per_head or per_head_format(mix.attention))
        return LatentFormats((q_low, kv_low), up[0] if up else "", out, keys, values)

    def _low(self, place: Place) -> list[Joined]:
        """The matrices of the first projection."""
        names = self._low_names(in_layer(self.names, place.layer))
        pieces = [Piece(*piece) for piece in zip(("q", "kv"), ((name,) for name in names), self.low_parts, strict=True)]
        return joined("low", pieces, self._formats(place.mix).low)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        low, *others = self._formats(mix)
        return tuple(dict.fromkeys(name for name in (*low, *others) if name))

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        if self.rope:
            yield from rope_ops(place, self.rope)

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return rope_constants(place, self.rope) if self.rope else {}

    def ops(self, place: Place) -> Iterator[Op]:
        formats, prefix, hidden = self._formats(place.mix), f"layers.{place.layer}.attention", place.hidden
        yield self._norm_rows(place, *formats.low)
        yield from joined_gemms(self._low(place), prefix, PART, LOW, hidden, self.bias)
        if self.q_rank:
            yield self._norm_queries(place, formats.q_up)
            stride, up = row_stride(self.query_width), f"{prefix}.q_up"
            yield gemm(PART, formats.q_up, LOW_QUERIES, up, QUERIES, self.query_width, self.q_rank, stride)
        yield self._divide(place, prefix)
        yield from self._per_head(place, "keys", PLAIN, Buffer(rows_name(ABSORBED, self.key_dim)), self.key_dim)
        yield self._attend(place)
        yield from self._per_head(place, "values", MIXED, Buffer(rows_name(ATTENDED, self.width)))
        yield from quantise(PART, ATTENDED, self.width, formats.out)
        yield gemm(
            PART, formats.out, ATTENDED, f"{prefix}.out", RESIDUAL, hidden, self.width, row_stride(hidden),
            bias=self.bias, accumulate=True,
        )  # fmt: skip

    def _norm_rows(self, place: Place, *formats: str, f32: bool = False) -> Op:
        return norm(place, PART, f"layers.{place.layer}.attention.norm", *formats, f32=f32)

    def _norm_queries(self, place: Place, *formats: str) -> Op:
        arguments = {
            "input": Buffer(LOW),
            "weight": Weight(f"layers.{place.layer}.attention.q_norm"),
            "output_f32": None,
            "width": self.q_rank,
            "input_stride": row_stride(self.low_width),
            **norm_outputs(LOW_QUERIES, self.q_rank, *formats),
            "eps": self.latent_eps,
            "logit_rows": False,
        }
        return Op("norm", PART, arguments, (0, "rows"))

    def _divide(self, place: Place, prefix: str) -> Op:
        """Queries into what turns and what does not, and the row of a token into the arena."""
        arguments = {
            "queries": Buffer(QUERIES if self.q_rank else LOW),
            "latents": Buffer(LOW, self.low_parts[0] * FP32),
            "rope": Buffer(rope_name(place, self.rope)) if self.rope else None,
            "norm": Weight(f"{prefix}.kv_norm"),
            "plain": Buffer(rows_name(PLAIN, self.nope_dim)),
            "q": Buffer(rows_name(ABSORBED, self.key_dim)),
            "kv": State(place.layer),
            "heads": self.heads,
            "nope_dim": self.nope_dim,
            "rope_dim": self.shared_dim,
            "rank": self.rank,
            "interleaved": bool(self.rope and self.rope.interleaved),
            "query_stride": row_stride(self.query_width if self.q_rank else self.low_width),
            "latent_stride": row_stride(self.low_width),
            "plain_stride": row_stride(self.nope_dim),
            "eps": self.latent_eps,
            **growth_fields(self.rope),
        }
        return Op("latent", PART, arguments, (self.heads + 1, "heads a row"))

    def _per_head(
        self, place: Place, matrix: str, source: str, output: Buffer, apart: int | None = None
    ) -> Iterator[Op]:
        """Every head's rows times its matrix. apart: from the output of a head to the next, if not its width."""
        formats = self._formats(place.mix)
        format = formats.keys if matrix == "keys" else formats.values
        columns, inputs = (self.rank, self.nope_dim) if matrix == "keys" else (self.value_dim, self.rank)
        yield from quantise(PART, source, inputs, format, self.heads)
        rows, stride = product_rows(source, inputs, format)
        arguments = {
            "format": Choice("Format", format),
            "input": rows,
            "weight": Weight(f"layers.{place.layer}.attention.{matrix}"),
            "output": output,
            "heads": self.heads,
            "columns": columns,
            "inputs": row_stride(inputs),
            "input_stride": self.heads * stride,
            "input_head_stride": stride,
            "weight_head_stride": packed_bytes(format, columns, inputs),
            "output_stride": self.heads * apart if apart else row_stride(self.width),
            "output_head_stride": apart or columns,
        }
        yield Op("head_gemm", PART, arguments, (self.heads * -(-columns // BLOCK), "column blocks of all heads"))

    def _attend(self, place: Place) -> Op:
        apart, groups = row_stride(self.rank), self.heads // self.together
        arguments: dict[str, Any] = {
            "kv": State(place.layer),
            "heads": self.heads,
            "kv_heads": groups,
            "head_dim": self.rank,
            "q": Buffer(rows_name(ABSORBED, self.key_dim)),
            "output": Buffer(rows_name(MIXED, self.rank)),
            "states": Buffer("states"),
            "sinks": None,
            "output_stride": self.heads * apart,
            "output_head_stride": apart,
            "window": 0,
            "scale": self.scale,
        }
        return Op("attention", PART, arguments, (groups, "groups of heads a tile and key block"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, formats, blocks = extents.rows, self._formats(place.mix), -(-extents.tokens // KEY_BLOCK)
        state = self.mixed_dim + STATE_EXTRA
        sizes = {
            LOW: rows * row_stride(self.low_width) * FP32,
            rows_name(ABSORBED, self.key_dim): rows * self.heads * self.key_dim * BF16,
            "states": extents.sequences * blocks * self.heads * state * FP32,
            **rows_buffers(PLAIN, self.nope_dim, formats.keys, rows * self.heads),
            **rows_buffers(MIXED, self.rank, formats.values, rows * self.heads),
            **rows_buffers(ATTENDED, self.width, formats.out, rows),
            **(rope_buffers(place, self.rope, rows) if self.rope else {}),
        }
        for format in formats.low:
            sizes |= rows_buffers(NORMED, place.hidden, format, rows)
        if self.q_rank:
            low, low_bytes = product_rows(LOW_QUERIES, self.q_rank, formats.q_up)
            sizes[low.name] = rows * low_bytes
            sizes[QUERIES] = rows * row_stride(self.query_width) * FP32
        return sizes

    # The rows of tokens.

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        nbytes, scaled = tokens * self.token_bytes(kv_format), kv_format != "bf16"
        rows = nbytes - SCALE * tokens if scaled else nbytes
        fields = {
            "head_stride": 0,
            "value_offset": 0,
            "key_dim": self.key_dim,
            "value_dim": self.mixed_dim,
            "format": Choice("Format", kv_format),
            "key_scales_offset": rows * scaled,
            "value_scales_offset": rows * scaled,
            "shared": True,
        }
        runs = ((0, rows), (rows, SCALE * tokens)) if scaled else ((0, rows),)
        return StateLayout(nbytes, nbytes // tokens, "KvLayout", fields, runs)

    def cost(self, place: Place, load: Load) -> Cost:
        """Rows are read once, whatever the number of heads; every head multiplies all their dimensions, twice."""
        formats, hidden, rows = self._formats(place.mix), place.hidden, load.rows
        total = product_cost(formats.out, hidden, self.width, rows)
        for format, width in zip(formats.low, self.low_parts, strict=True):
            total += product_cost(format, width, hidden, rows)
        if self.q_rank:
            total += product_cost(formats.q_up, self.query_width, self.q_rank, rows)
        of_heads = (formats.keys, self.rank, self.nope_dim), (formats.values, self.value_dim, self.rank)
        for format, columns, inputs in of_heads:
            total += Cost(float(self.heads * packed_bytes(format, columns, inputs)))
            total += operations(format, self.heads * columns * inputs * rows)
        multiplied = 2.0 * load.pairs * self.heads * (self.row_dim + self.rank)
        return total + Cost(float(load.tokens * self.token_bytes(load.kv_format)), multiplied)

    # A step on a device, as of grouped-query attention: it mirrors rows, the threads attend to older ones.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        if not self.rope:
            return None
        hidden, of_heads = place.hidden, self.heads * self.rank * (self.nope_dim + self.value_dim)
        matrices = (self.low_width + self.width) * hidden + self.query_width * self.q_rank + of_heads
        norms = hidden * (1 + (place.norm == "layer")) + self.rank + self.q_rank
        biases = (self.low_width + hidden) * self.bias
        return DeviceNeeds(
            weights=matrices * BF16 + (norms + biases) * FP32,
            token=self.row_dim * BF16,
            row_floats=2 * self.low_width + 3 * self.query_width + self.heads * (2 * self.row_dim + 2 * self.rank),
            scores=self.heads,
        )

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows = extents.rows
        return {NEW_KV: rows * self.row_dim * FP32, ENDS: rows * 4, STATES: rows * self.state_floats * FP32}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        """Last, the rows of the step's tokens go home: they come normed and turned."""
        found = {op.kind: op for op in ops}
        unknown = set(found) - {"norm", "gemm", "latent", "head_gemm", "attention", "quantise"}
        if unknown:
            raise ValueError(f"a device does not know what becomes of {sorted(unknown)} of latent attention")
        yield from ops_for_older(found["attention"])
        nothing = {"heads": 0, "queries": None, "rope": None, "norm": None, "plain": None, "q": None}
        rows = {"latents": Buffer(NEW_KV), "latent_stride": self.row_dim}
        yield replace(found["latent"], arguments=found["latent"].arguments | nothing | rows, split=(0, "rows"))


def per_head_format(format: str) -> str:
    """The format of the matrices of heads where a mix names none, in a model all of whose attention has this one: bf16
    where the matrix as published cannot be taken apart and turned without being quantised again. They are bf16 beside
    several formats.
    """
    return format if format in PER_HEAD_FORMATS else "bf16"
