"""Gated DeltaNet: every value head has a matrix that each token corrects, so that its key finds its value there.

The state of a sequence is of one size: the matrices of all value heads with the tokens that are not yet written into
them, then what the short convolution keeps, as `cpu_kernels` lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.products import (
    BF16,
    FP32,
    NORMED,
    NORMED_F32,
    RESIDUAL,
    between_calls,
    gemm,
    norm,
    norm_shapes,
    norm_tensors,
    product_cost,
    quantise,
    rows_buffers,
    rows_name,
    score,
    unnormed_buffers,
    unnormed_constants,
)
from hybrid.models.layers.recurrent import PART, convolve, state_layout
from hybrid.models.layers.side_by_side import Joined, Piece, joined, joined_gemms, joined_tensors
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, PerHead, Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight

# Buffers: queries, keys, values and gates of all heads; what decays are made of; what queries found.
PROJECTED, DECAYS, FOUND = "projected", "decays", "found"


@dataclass(frozen=True)
class GatedDeltaNames:
    """Names in a checkpoint. norm: empty where what it reads is normed. grouped, grouped_decays: of projections that
    are made for one key head after the other; empty where queries, keys and values of all heads and gates, or betas and
    decays, have projections of their own. q, k, v: of projections apart, of which each has a convolution; empty where
    those of `qkv` and `taps` are for all.
    """

    norm: str = "model.layers.{layer}.input_layernorm.weight"
    grouped: str = "model.layers.{layer}.linear_attn.in_proj_qkvz.weight"
    grouped_decays: str = "model.layers.{layer}.linear_attn.in_proj_ba.weight"
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = "model.layers.{layer}.linear_attn.in_proj_qkv.weight"
    gates: str = "model.layers.{layer}.linear_attn.in_proj_z.weight"
    betas: str = "model.layers.{layer}.linear_attn.in_proj_b.weight"
    decays: str = "model.layers.{layer}.linear_attn.in_proj_a.weight"
    q_taps: str = ""
    k_taps: str = ""
    v_taps: str = ""
    taps: str = "model.layers.{layer}.linear_attn.conv1d.weight"
    decay_rate: str = "model.layers.{layer}.linear_attn.A_log"
    decay_bias: str = "model.layers.{layer}.linear_attn.dt_bias"
    head_norm: str = "model.layers.{layer}.linear_attn.norm.weight"
    out: str = "model.layers.{layer}.linear_attn.out_proj.weight"


@dataclass(frozen=True)
class GatedDeltaNet:
    """A key head, of queries and of keys, serves `value_heads / key_heads` value heads: adjacent ones, or if they are
    `in_turn` every `key_heads`-th. taps: tokens that a channel of the convolution sees, the newest included. gate: the
    function of the gates. eps: of the norm of what a head found, None: that of all norms. beta_scale: of betas, which
    are sigmoids.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    in_turn: bool = False
    gate: Literal["silu", "sigmoid"] = "silu"
    eps: float | None = None
    beta_scale: float = 1.0
    names: GatedDeltaNames = field(default_factory=GatedDeltaNames)

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width

    @property
    def width(self) -> int:
        """Rows of the projection: what is convolved, then gates."""
        return self.channels + self.value_width

    @property
    def rope(self) -> RopeSpec | None:
        return None

    def within(self, tokens: int) -> Self:
        return self

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden, heads = in_layer(self.names, place.layer), place.hidden, self.value_heads
        yield from norm_shapes(place, names.norm)
        if names.grouped:
            yield names.grouped, (self.width, hidden)
        else:
            for name, rows in (*self._convolved(names), (names.gates, self.value_width)):
                yield name, (rows, hidden)
        if names.grouped_decays:
            yield names.grouped_decays, (2 * heads, hidden)
        else:
            yield names.betas, (heads, hidden)
            yield names.decays, (heads, hidden)
        for name, rows in self._taps(names):
            yield name, (rows, 1, self.taps)
        yield names.decay_rate, (heads,)
        yield names.decay_bias, (heads,)
        yield names.head_norm, (self.value_dim,)
        yield names.out, (hidden, self.value_width)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, (matrices, out), hidden = in_layer(self.names, place.layer), self._projections(place), place.hidden
        yield from norm_tensors(place, shard, "delta.norm", names.norm)
        yield from joined_tensors(matrices, "delta", PART, shard, hidden)
        taps = Stacked(tuple(name for name, _ in self._taps(names)))
        yield shard.floats("delta.decays", PART, self._decays(names), 2 * self.value_heads, hidden)
        yield shard.floats("delta.taps", PART, taps, self.channels, self.taps)
        yield shard.floats("delta.decay_rate", PART, Stacked((names.decay_rate,)), self.value_heads)
        yield shard.floats("delta.decay_bias", PART, Stacked((names.decay_bias,)), self.value_heads)
        yield shard.floats("delta.head_norm", "norms", Stacked((names.head_norm,)), self.value_dim)
        last = (len(self._pieces(names)),)
        yield shard.matrix("delta.out", PART, Stacked((names.out,)), out, hidden, self.value_width, last)

    def _pieces(self, names: GatedDeltaNames) -> list[Piece]:
        """Queries of all heads, then keys, values and gates."""
        if not names.grouped:
            words = "qkv" if names.q else ("qkv",)
            convolved = zip(words, self._convolved(names), strict=True)
            first = [Piece(word, (name,), rows) for word, (name, rows) in convolved]
            return [*first, Piece("gates", (names.gates,), self.value_width)]
        values = self.value_width // self.key_heads
        parts = self._ungrouped(names.grouped, self.key_dim, self.key_dim, values, values).parts
        return [Piece("qkv_gates", parts, self.width)]

    def _convolved(self, names: GatedDeltaNames) -> list[tuple[str, int]]:
        """Projections of queries, keys and values that are not grouped, and their rows."""
        return self._apart(names.q, names.k, names.v) if names.q else [(names.qkv, self.channels)]

    def _taps(self, names: GatedDeltaNames) -> list[tuple[str, int]]:
        """Weights of convolutions, and their channels."""
        return self._apart(names.q_taps, names.k_taps, names.v_taps) if names.q else [(names.taps, self.channels)]

    def _apart(self, q: str, k: str, v: str) -> list[tuple[str, int]]:
        return [(q, self.key_width), (k, self.key_width), (v, self.value_width)]

    def _projections(self, place: Place) -> tuple[list[Joined], str]:
        """The matrices of what reads the residual stream, and the format of that of the output."""
        pieces = self._pieces(in_layer(self.names, place.layer))
        *formats, out = matrix_formats(place.mix.attention, len(pieces) + 1)
        return joined("in", pieces, formats), out

    def _decays(self, names: GatedDeltaNames) -> Stacked:
        """What betas are made of, then decays."""
        if not names.grouped_decays:
            return Stacked((names.betas, names.decays))
        heads = self.value_heads // self.key_heads
        return self._ungrouped(names.grouped_decays, heads, heads)

    def _ungrouped(self, name: str, *sizes: int) -> Stacked:
        """The same rows of a tensor, which has parts of these sizes for each key head, part by part."""
        starts = [sum(sizes[:part]) for part in range(len(sizes))]
        rows = zip(starts, sizes, strict=True)
        return Stacked(tuple(PerHead(name, self.key_heads, sum(sizes), start, size) for start, size in rows))

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return tuple(dict.fromkeys(matrix_formats(mix.attention, len(self._pieces(self.names)) + 1)))

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {} if self.names.norm else unnormed_constants(place)

    def ops(self, place: Place) -> Iterator[Op]:
        (matrices, out), prefix, hidden = self._projections(place), f"layers.{place.layer}.delta", place.hidden
        formats = (matrix.format for matrix in matrices)
        yield norm(place, PART, f"{prefix}.norm" * bool(self.names.norm), *formats, f32=True)
        yield from joined_gemms(matrices, prefix, PART, PROJECTED, hidden)
        # Every later token feels their error.
        yield score(PART, f"{prefix}.decays", DECAYS, 2 * self.value_heads, hidden, "heads")
        yield convolve(
            place.layer, PROJECTED, f"{prefix}.taps", self._matrix_bytes(), self.channels, self.taps,
            row_stride(self.width),
        )  # fmt: skip
        yield self._correct(place, prefix)
        yield from quantise(PART, FOUND, self.value_width, out)
        yield gemm(
            PART, out, FOUND, f"{prefix}.out", RESIDUAL, hidden, self.value_width, row_stride(hidden),
            accumulate=True,
        )  # fmt: skip

    def _correct(self, place: Place, prefix: str) -> Op:
        arguments = {
            "input": Buffer(PROJECTED),
            "decays": Buffer(DECAYS),
            "decay_rate": Weight(f"{prefix}.decay_rate"),
            "decay_bias": Weight(f"{prefix}.decay_bias"),
            "norm": Weight(f"{prefix}.head_norm"),
            "output": Buffer(rows_name(FOUND, self.value_width)),
            "state": State(place.layer),
            "key_heads": self.key_heads,
            "value_heads": self.value_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "input_stride": row_stride(self.width),
            "decay_stride": 2 * self.value_heads,
            "output_stride": row_stride(self.value_width),
            "eps": place.eps if self.eps is None else self.eps,
        }
        flags = {"in_turn": self.in_turn, "sigmoid": self.gate == "sigmoid"}
        arguments |= {name: True for name, value in flags.items() if value}
        if self.beta_scale != 1:
            arguments["beta_scale"] = self.beta_scale
        return Op("gated_delta", PART, arguments, (self.value_heads, "heads"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, (matrices, out) = extents.rows, self._projections(place)
        sizes = {
            PROJECTED: rows * row_stride(self.width) * FP32,
            DECAYS: rows * 2 * self.value_heads * FP32,
            NORMED_F32: rows * row_stride(place.hidden) * FP32,
            **rows_buffers(FOUND, self.value_width, out, rows),
        }
        for matrix in matrices:
            sizes |= rows_buffers(NORMED, place.hidden, matrix.format, rows)
        return sizes if self.names.norm else sizes | unnormed_buffers(place)

    def _matrix_bytes(self) -> int:
        return int(cpu_kernels.delta_state_bytes(self.value_heads, self.key_dim, self.value_dim))

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        return state_layout(self._matrix_bytes(), self.channels, self.taps)

    def cost(self, place: Place, load: Load) -> Cost:
        """Each token multiplies the matrices three times: by its key, by its query, and its correction by its key."""
        (projections, out), hidden, rows = self._projections(place), place.hidden, load.rows
        scores, total = 2 * self.value_heads, product_cost(out, hidden, self.value_width, rows)
        for matrix in projections:
            total += product_cost(matrix.format, matrix.rows, hidden, rows)
        matrices = self.value_heads * self.key_dim * self.value_dim
        floats = matrices + self.taps * self.channels
        read = Cost(float(FP32 * (scores * hidden + load.sequences * floats)))
        return (
            total + read + Cost(0.0, rows * (6.0 * matrices + 2.0 * scores * hidden + 2.0 * self.channels * self.taps))
        )

    # A step on a device, which projects; the threads convolve and correct, and so the state has one home.

    def device_needs(self, place: Place) -> DeviceNeeds:
        hidden, scores = place.hidden, 2 * self.value_heads
        floats = hidden * (1 + (place.norm == "layer")) + scores * hidden
        weights = (self.width + self.value_width) * hidden * BF16 + floats * FP32
        return DeviceNeeds(weights=weights, token=0, row_floats=2 * self.width + 2 * self.value_width, scores=0)

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        found = {op.kind: op for op in ops}
        unknown = set(found) - {"norm", "gemm", "router", "silu_conv", "gated_delta", "quantise"}
        if unknown:
            raise ValueError(f"a device does not know what becomes of {sorted(unknown)} of the gated delta rule")
        yield from between_calls(found["silu_conv"], found["gated_delta"])
