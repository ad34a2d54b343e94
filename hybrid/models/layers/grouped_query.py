"""Grouped-query attention: rope, a window, sinks, biases, norms on the heads of queries and keys.

Keys and values of a sequence lie as [kv head][keys | values], every run contiguous for all its tokens. int8 and fp8
have a float32 scale for each token of a head: [keys | values | key scales | value scales].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels import KEY_BLOCK
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.grouped_query_shape import SCALE, GroupedQueryShape
from hybrid.models.layers.older_tokens import ENDS, NEW_KV, STATES, ops_for_older
from hybrid.models.layers.products import (
    BF16,
    FP32,
    MADE,
    NORMED,
    RESIDUAL,
    add_normed,
    gemm,
    made_buffers,
    norm,
    norm_shapes,
    norm_tensors,
    product_cost,
    quantise,
    rows_buffers,
    rows_name,
    unnormed_buffers,
    unnormed_constants,
)
from hybrid.models.layers.rotary import growth_fields, rope_buffers, rope_constants, rope_name, rope_ops
from hybrid.models.layers.side_by_side import Joined, Piece, joined, joined_gemms, joined_tensors
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor, bias_name, in_layer, inside
from hybrid.ops import Buffer, Choice, Op, State, Weight

PART = "attention"


@dataclass(frozen=True)
class GroupedQueryNames:
    """Names in a checkpoint. Biases take the name of their weight with `.weight` replaced by `.bias`. norm, post_norm:
    of what attention reads, and of what it adds to the residual stream; empty where that is not normed. qkv: of
    queries, keys and values, where they are one matrix.
    """

    norm: str = "model.layers.{layer}.input_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj.weight"
    k: str = "model.layers.{layer}.self_attn.k_proj.weight"
    v: str = "model.layers.{layer}.self_attn.v_proj.weight"
    out: str = "model.layers.{layer}.self_attn.o_proj.weight"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    sinks: str = "model.layers.{layer}.self_attn.sinks"
    post_norm: str = ""
    qkv: str = ""
    gate: str = "model.layers.{layer}.self_attn.g_proj.weight"


@dataclass(frozen=True)
class GroupedQueryAttention(GroupedQueryShape):
    """window: a query sees the last `window` tokens, itself included; None: all. sinks: a logit a head without a value
    that shares in every softmax. scale: of the scores; None: head_dim ** -0.5. norm_last: the norms of queries and keys
    come after rope. out_scale: of what is added to the residual stream. value_norm: whether values have a norm, per
    head and without a weight. score_cap: between which and less itself a tangent keeps scores; 0: no bounds.
    """

    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    sinks: bool = False
    scale: float | None = None
    norm_last: bool = False
    out_scale: float = 1.0
    value_norm: bool = False
    score_cap: float = 0.0
    names: GroupedQueryNames = field(default_factory=GroupedQueryNames)

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def within(self, tokens: int) -> Self:
        return self

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def _pieces(self, names: GroupedQueryNames) -> list[Piece]:
        if names.qkv:
            return [Piece("qkv", (names.qkv,), self.qkv_width)]
        widths = {"q": self.query_width, "k": self.kv_width, "v": self.values_width, "gate": self.gate_width}
        return [Piece(name, (getattr(names, name),), width) for name, width in widths.items() if width]

    def _projections(self, place: Place) -> tuple[list[Joined], str]:
        """The matrices of queries, keys and values, and the format of that of the output."""
        pieces = self._pieces(in_layer(self.names, place.layer))
        *formats, out = matrix_formats(place.mix.attention, len(pieces) + 1)
        return joined("qkv", pieces, formats), out

    def _read_formats(self, place: Place) -> tuple[str, ...]:
        """Of the matrices that the normed rows are multiplied with."""
        return tuple(matrix.format for matrix in self._projections(place)[0])

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden = in_layer(self.names, place.layer), place.hidden
        yield from norm_shapes(place, names.norm)
        for piece in self._pieces(names):
            for name in map(str, piece.sources):
                yield name, (piece.rows, hidden)
                if self.qkv_bias:
                    yield bias_name(name), (piece.rows,)
        yield names.out, (hidden, self.width)
        if self.out_bias:
            yield bias_name(names.out), (hidden,)
        yield from zip((names.q_norm, names.k_norm), self.norm_sizes, strict=False)
        if self.sinks:
            yield names.sinks, (self.heads,)
        if names.post_norm:
            yield from norm_shapes(place, names.post_norm)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, (matrices, out) = in_layer(self.names, place.layer), self._projections(place)
        yield from norm_tensors(place, shard, "attention.norm", names.norm)
        yield from joined_tensors(matrices, "attention", PART, shard, place.hidden, self.qkv_bias)
        for name, source, size in zip("qk", (names.q_norm, names.k_norm), self.norm_sizes, strict=False):
            yield shard.floats(f"attention.{name}_norm", "norms", Stacked((source,), plus=place.norm_plus), *size)
        if self.sinks:
            yield shard.floats("attention.sinks", PART, Stacked((names.sinks,)), self.heads)
        last = (len(self._pieces(names)),)
        yield shard.matrix("attention.out", PART, Stacked((names.out,)), out, place.hidden, self.width, last)
        if self.out_bias:
            yield shard.bias("attention.out_bias", PART, (names.out,), place.hidden)
        if names.post_norm:
            yield from norm_tensors(place, shard, "attention.post_norm", names.post_norm)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return tuple(dict.fromkeys(matrix_formats(mix.attention, len(self._pieces(self.names)) + 1)))

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        if self.rope:
            yield from rope_ops(place, self.rope)

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        found = {} if self.names.norm else unnormed_constants(place)
        return found | rope_constants(place, self.rope) if self.rope else found

    def ops(self, place: Place) -> Iterator[Op]:
        (matrices, out), prefix, hidden = self._projections(place), f"layers.{place.layer}.attention", place.hidden
        yield norm(place, PART, f"{prefix}.norm" * bool(self.names.norm), *self._read_formats(place))
        yield from joined_gemms(matrices, prefix, PART, "qkv", hidden, self.qkv_bias)
        yield self._split_heads(place, prefix)
        yield self._attend(place, prefix)
        if self.gate:
            yield self.gate.op(PART, self.heads, self.value_size, self.qkv_width)
        yield from quantise(PART, "attended", self.width, out)
        normed = bool(self.names.post_norm)
        yield gemm(
            PART, out, "attended", f"{prefix}.out", MADE if normed else RESIDUAL, hidden, self.width,
            row_stride(hidden), bias=self.out_bias, accumulate=not normed, scale=self.out_scale,
        )  # fmt: skip
        if normed:
            yield add_normed(place, PART, f"{prefix}.post_norm")

    def _split_heads(self, place: Place, prefix: str) -> Op:
        """Queries, keys and values of every row: normed, turned, and written where attention looks for them."""
        normed = self.qk_norm != "none"
        arguments = {
            "qkv": Buffer("qkv"),
            "rope": Buffer(rope_name(place, self.rope)) if self.rope else None,
            "q_norm": Weight(f"{prefix}.q_norm") if normed else None,
            "k_norm": Weight(f"{prefix}.k_norm") if normed else None,
            "q": Buffer("q"),
            "rope_dim": self.rope.dim if self.rope else 0,
            "interleaved": bool(self.rope and self.rope.interleaved),
            "qkv_stride": row_stride(self.qkv_width),
            "eps": place.eps,
            "norm_whole": self.qk_norm == "whole",
            "norm_last": self.norm_last,
        }
        flags = {
            "gated": bool(self.gate and not self.gate.apart),
            "norm_apart": self.qk_norm == "apart",
            "norm_values": self.value_norm,
            "keys_are_values": self.keys_are_values,
        }
        if self.value_head_dim:
            arguments["value_head_dim"] = self.value_head_dim
        arguments |= {name: True for name, value in flags.items() if value} | growth_fields(self.rope)
        return Op("qkv", PART, self._shape(place) | arguments, (self.heads + 2 * self.kv_heads, "heads a row"))

    def _attend(self, place: Place, prefix: str) -> Op:
        arguments = {
            "q": Buffer("q"),
            "output": Buffer(rows_name("attended", self.width)),
            "states": Buffer("states"),
            "sinks": Weight(f"{prefix}.sinks") if self.sinks else None,
            "output_stride": row_stride(self.width),
            "window": self.window or 0,
            "scale": self.softmax_scale,
            "head_dim": self.value_size,
        }
        if self.score_cap:
            arguments["score_cap"] = self.score_cap
        split = (self.kv_heads, "KV heads a tile and key block")
        return Op("attention", PART, self._shape(place) | arguments, split)

    def _shape(self, place: Place) -> dict[str, Any]:
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"kv": State(place.layer), **shape}

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, blocks, (matrices, out) = extents.rows, -(-extents.tokens // KEY_BLOCK), self._projections(place)
        sizes = {
            "qkv": rows * row_stride(self.qkv_width) * FP32,
            "q": rows * self.heads * self.key_dim * BF16,
            "states": extents.sequences * blocks * self.state_floats * FP32,
            **rows_buffers("attended", self.width, out, rows),
        }
        for matrix in matrices:
            sizes |= rows_buffers(NORMED, place.hidden, matrix.format, rows)
        if self.names.post_norm:
            sizes |= made_buffers(place, rows)
        if not self.names.norm:
            sizes |= unnormed_buffers(place)
        return sizes | rope_buffers(place, self.rope, rows) if self.rope else sizes

    # Keys and values.

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        scaled, size = kv_format != "bf16", BF16 if kv_format == "bf16" else 1
        stride, values = tokens * self.token_bytes(kv_format), tokens * self.key_dim * size
        scales = stride - 2 * SCALE * tokens if scaled else stride
        parts = [(0, values), (values, scales - values)]
        if scaled:
            parts += [(scales, SCALE * tokens), (scales + SCALE * tokens, SCALE * tokens)]
        heads = range(0, self.kv_heads * stride, stride)
        runs = [(head + start, size) for head in heads for start, size in parts]
        fields = {
            "head_stride": stride,
            "value_offset": values,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "format": Choice("Format", kv_format),
            "key_scales_offset": scales * scaled,
            "value_scales_offset": (stride - SCALE * tokens) * scaled,
        }
        nbytes = self.kv_heads * stride
        return StateLayout(nbytes, nbytes // tokens, "KvLayout", fields, tuple(runs))

    def cost(self, place: Place, load: Load) -> Cost:
        """Scores and weighted values are floats, whatever the format of keys and values."""
        matrices, out = self._projections(place)
        projections = product_cost(out, place.hidden, self.width, load.rows)
        for matrix in matrices:
            projections += product_cost(matrix.format, matrix.rows, place.hidden, load.rows)
        read = load.tokens * self.kv_heads * self.token_bytes(load.kv_format)
        return projections + Cost(read, 2.0 * load.pairs * self.heads * (self.head_dim + self.value_size))

    # A step on a device: it attends to the tokens that it mirrors, the threads to older ones.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        """No device norms values, or heads apart, takes keys for values, has them of another size, or bounds scores."""
        values = self.value_norm or self.keys_are_values or self.value_size != self.head_dim
        if values or self.qk_norm == "apart" or self.score_cap:
            return None
        hidden, width = place.hidden, self.qkv_width
        norms = sum(size for (size,) in self.norm_sizes) + hidden * (
            (place.norm == "layer") + bool(self.names.post_norm)
        )
        norms -= hidden * (not self.names.norm)
        biases = width * self.qkv_bias + hidden * self.out_bias + self.heads * self.sinks
        return DeviceNeeds(
            weights=(width + self.width) * hidden * BF16 + (hidden + norms + biases) * FP32,
            token=2 * self.kv_width * BF16,
            row_floats=3 * width + 2 * self.width,
            scores=self.heads,
        )

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows = extents.rows
        return {NEW_KV: rows * 2 * self.kv_width * FP32, ENDS: rows * 4, STATES: rows * self.state_floats * FP32}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        """In the callback `attend` the device begins with what it mirrors. Then come states of older tokens, if there
        are any, which it joins with its own in the callback `route`. Last, the step's keys and values go home.
        """
        found = {op.kind: op for op in ops}
        unknown = set(found) - {"norm", "gemm", "qkv", "attention", "gate", "quantise"}
        if unknown:
            raise ValueError(f"a device does not know what becomes of {sorted(unknown)} of attention")
        qkv = found["qkv"]
        yield from ops_for_older(found["attention"])
        nothing = {"heads": 0, "q": None, "rope": None, "rope_dim": 0, "q_norm": None, "k_norm": None}
        rows = {"qkv": Buffer(NEW_KV), "qkv_stride": 2 * self.kv_width}  # keys come normed and turned
        yield replace(qkv, arguments=qkv.arguments | nothing | rows, split=(2 * self.kv_heads, "heads a row"))
