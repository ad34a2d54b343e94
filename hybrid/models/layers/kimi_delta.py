"""Kimi Delta Attention (KDA): the delta rule of Gated DeltaNet with a decay for each channel of keys.

Every head has a matrix that each token corrects, so that its key finds its value there. The state of a sequence is of
one size: the matrices of all heads with the tokens that are not yet written into them, then what the short convolution
keeps, both as `cpu_kernels` lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.gated_delta import FOUND, PROJECTED
from hybrid.models.layers.products import (
    FP32,
    NORMED,
    NORMED_F32,
    RESIDUAL,
    UNNORMED_WEIGHT,
    as_rows,
    gemm,
    norm,
    norm_shapes,
    norm_tensors,
    product_cost,
    product_rows,
    quantise,
    rows_buffers,
    rows_name,
    score,
)
from hybrid.models.layers.recurrent import PART, convolve, state_layout
from hybrid.models.layers.side_by_side import Joined, Piece, joined, joined_gemms, joined_tensors
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight

# Buffers. PROJECTED holds queries, keys and values of all heads, then decays and gates, or the latents of both. RAISED:
# decays and gates that were made of latents. ONES: the weights of a norm that leaves latents as they are.
BETAS, RAISED, ONES = "betas", "raised", "unnormed_latents"


@dataclass(frozen=True)
class KimiDeltaNames:
    """Names in a checkpoint. decays_down, gates_down: of the projections to latents."""

    norm: str = "model.layers.{layer}.input_layernorm.weight"
    q: str = "model.layers.{layer}.self_attn.q_proj.weight"
    k: str = "model.layers.{layer}.self_attn.k_proj.weight"
    v: str = "model.layers.{layer}.self_attn.v_proj.weight"
    q_taps: str = "model.layers.{layer}.self_attn.q_conv1d.weight"
    k_taps: str = "model.layers.{layer}.self_attn.k_conv1d.weight"
    v_taps: str = "model.layers.{layer}.self_attn.v_conv1d.weight"
    decays_down: str = "model.layers.{layer}.self_attn.f_a_proj.weight"
    decays: str = "model.layers.{layer}.self_attn.f_b_proj.weight"
    gates_down: str = "model.layers.{layer}.self_attn.g_a_proj.weight"
    gates: str = "model.layers.{layer}.self_attn.g_b_proj.weight"
    betas: str = "model.layers.{layer}.self_attn.b_proj.weight"
    decay_rate: str = "model.layers.{layer}.self_attn.A_log"
    decay_bias: str = "model.layers.{layer}.self_attn.dt_bias"
    head_norm: str = "model.layers.{layer}.self_attn.o_norm.weight"
    out: str = "model.layers.{layer}.self_attn.o_proj.weight"

    @property
    def taps(self) -> tuple[str, str, str]:
        return self.q_taps, self.k_taps, self.v_taps


class KimiDeltaFormats(NamedTuple):
    """into: of what reads the residual stream, piece by piece. raised: of decays and of gates that latents make."""

    into: tuple[str, ...]
    raised: tuple[str, ...]
    out: str


@dataclass(frozen=True)
class KimiDeltaAttention:
    """head_dim: of queries, keys and values. taps: tokens that a channel of the convolution sees, the newest included.
    rank: of the latents of decays and of those of gates, 0 if both are projected at once. lower_bound: of the logarithm
    of a decay, which a sigmoid makes then; 0: none, and softplus makes it. rates: shape of the tensor of rates.
    """

    heads: int
    head_dim: int
    taps: int
    rank: int
    lower_bound: float
    rates: tuple[int, ...]
    names: KimiDeltaNames = field(default_factory=KimiDeltaNames)

    @property
    def width(self) -> int:
        """Of queries, keys, values, decays and gates of all heads, each."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return 3 * self.width

    @property
    def low(self) -> int:
        """Of decays and of gates as the residual stream makes them."""
        return self.rank or self.width

    @property
    def projected_width(self) -> int:
        return self.channels + 2 * self.low

    @property
    def rope(self) -> RopeSpec | None:
        return None

    def within(self, tokens: int) -> Self:
        return self

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden, width = in_layer(self.names, place.layer), place.hidden, self.width
        yield from norm_shapes(place, names.norm)
        for piece in self._pieces(names):
            for source in piece.sources:
                yield str(source), (piece.rows, hidden)
        for name in self._raised(names):
            yield name, (width, self.rank)
        for name in names.taps:
            yield name, (width, 1, self.taps)
        yield names.betas, (self.heads, hidden)
        yield names.decay_rate, self.rates
        yield names.decay_bias, (width,)
        yield names.head_norm, (self.head_dim,)
        yield names.out, (hidden, width)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, formats, hidden = in_layer(self.names, place.layer), self._formats(place.mix), place.hidden
        yield from norm_tensors(place, shard, "delta.norm", names.norm)
        yield from joined_tensors(self._joined(place), "delta", PART, shard, hidden)
        yield shard.floats("delta.betas", PART, Stacked((names.betas,)), self.heads, hidden)
        yield shard.floats("delta.taps", PART, Stacked(names.taps), self.channels, self.taps)
        position = len(formats.into)
        for which, name, format in zip(("decays", "gates"), self._raised(names), formats.raised, strict=False):
            origin = Stacked((name,))
            yield shard.matrix(f"delta.{which}", PART, origin, format, self.width, self.rank, (position,))
            position += 1
        yield shard.floats("delta.decay_rate", PART, Stacked((names.decay_rate,)), self.heads)
        yield shard.floats("delta.decay_bias", PART, Stacked((names.decay_bias,)), self.width)
        yield shard.floats("delta.head_norm", "norms", Stacked((names.head_norm,)), self.head_dim)
        yield shard.matrix("delta.out", PART, Stacked((names.out,)), formats.out, hidden, self.width, (position,))

    def _pieces(self, names: KimiDeltaNames) -> list[Piece]:
        """What reads the residual stream."""
        low = (names.decays_down, names.gates_down) if self.rank else (names.decays, names.gates)
        three = [
            Piece(which, (name,), self.width) for which, name in zip("qkv", (names.q, names.k, names.v), strict=True)
        ]
        return [*three, *(Piece(which, (name,), self.low) for which, name in zip("fg", low, strict=True))]

    def _raised(self, names: KimiDeltaNames) -> tuple[str, ...]:
        """What reads latents: of decays, then of gates."""
        return (names.decays, names.gates) if self.rank else ()

    def _formats(self, mix: FormatMix) -> KimiDeltaFormats:
        pieces, raised = len(self._pieces(self.names)), len(self._raised(self.names))
        *formats, out = matrix_formats(mix.attention, pieces + raised + 1)
        return KimiDeltaFormats(tuple(formats[:pieces]), tuple(formats[pieces:]), out)

    def _joined(self, place: Place) -> list[Joined]:
        return joined("in", self._pieces(in_layer(self.names, place.layer)), self._formats(place.mix).into)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        into, raised, out = self._formats(mix)
        return tuple(dict.fromkeys((*into, *raised, out)))

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {ONES: np.full(self.rank, UNNORMED_WEIGHT, np.float32)} if self.rank else {}

    def ops(self, place: Place) -> Iterator[Op]:
        formats, prefix, hidden = self._formats(place.mix), f"layers.{place.layer}.delta", place.hidden
        yield norm(place, PART, f"{prefix}.norm", *formats.into, f32=True)
        yield from joined_gemms(self._joined(place), prefix, PART, PROJECTED, hidden)
        yield score(PART, f"{prefix}.betas", BETAS, self.heads, hidden, "heads")
        yield convolve(
            place.layer, PROJECTED, f"{prefix}.taps", self._matrix_bytes(), self.channels, self.taps,
            row_stride(self.projected_width),
        )  # fmt: skip
        for number, format in enumerate(formats.raised):
            yield from self._raise(prefix, number, format)
        yield self._correct(place, prefix)
        yield from quantise(PART, FOUND, self.width, formats.out)
        yield gemm(
            PART, formats.out, FOUND, f"{prefix}.out", RESIDUAL, hidden, self.width, row_stride(hidden),
            accumulate=True,
        )  # fmt: skip

    def _raise(self, prefix: str, number: int, format: str) -> Iterator[Op]:
        """Decays (number 0) or gates (1) of their latents, which become rows of a product as they are."""
        which = ("decays", "gates")[number]
        latents = Buffer(PROJECTED, (self.channels + number * self.rank) * FP32)
        yield as_rows(PART, latents, row_stride(self.projected_width), ONES, _latents(which), self.rank, format)
        yield gemm(
            PART, format, _latents(which), f"{prefix}.{which}", RAISED, self.width, self.rank,
            row_stride(2 * self.width), first=number * self.width,
        )  # fmt: skip

    def _correct(self, place: Place, prefix: str) -> Op:
        source, first = (RAISED, 0) if self.rank else (PROJECTED, self.channels)
        stride = row_stride(2 * self.width if self.rank else self.projected_width)
        arguments = {
            "input": Buffer(PROJECTED),
            "decays": Buffer(source, first * FP32),
            "betas": Buffer(BETAS),
            "gates": Buffer(source, (first + self.width) * FP32),
            "decay_rate": Weight(f"{prefix}.decay_rate"),
            "decay_bias": Weight(f"{prefix}.decay_bias"),
            "norm": Weight(f"{prefix}.head_norm"),
            "output": Buffer(rows_name(FOUND, self.width)),
            "state": State(place.layer),
            "heads": self.heads,
            "key_dim": self.head_dim,
            "value_dim": self.head_dim,
            "input_stride": row_stride(self.projected_width),
            "decay_stride": stride,
            "beta_stride": self.heads,
            "gate_stride": stride,
            "output_stride": row_stride(self.width),
            "eps": place.eps,
            "lower_bound": self.lower_bound,
        }
        return Op("kimi_delta", PART, arguments, (self.heads, "heads"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, formats = extents.rows, self._formats(place.mix)
        sizes = {
            PROJECTED: rows * row_stride(self.projected_width) * FP32,
            BETAS: rows * self.heads * FP32,
            NORMED_F32: rows * row_stride(place.hidden) * FP32,
            **rows_buffers(FOUND, self.width, formats.out, rows),
        }
        for format in formats.into:
            sizes |= rows_buffers(NORMED, place.hidden, format, rows)
        for which, format in zip(("decays", "gates"), formats.raised, strict=False):
            latents, size = product_rows(_latents(which), self.rank, format)
            sizes[latents.name] = rows * size
        if self.rank:
            sizes |= {RAISED: rows * row_stride(2 * self.width) * FP32, ONES: self.rank * FP32}
        return sizes

    def _matrix_bytes(self) -> int:
        return int(cpu_kernels.delta_state_bytes(self.heads, self.head_dim, self.head_dim, by_channel=True))

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        return state_layout(self._matrix_bytes(), self.channels, self.taps)

    def cost(self, place: Place, load: Load) -> Cost:
        """Each token multiplies the matrices three times: by its key, by its query, and its correction by its key."""
        formats, hidden, rows = self._formats(place.mix), place.hidden, load.rows
        total = product_cost(formats.out, hidden, self.width, rows)
        for matrix in self._joined(place):
            total += product_cost(matrix.format, matrix.rows, hidden, rows)
        for format in formats.raised:
            total += product_cost(format, self.width, self.rank, rows)
        matrices = self.width * self.head_dim
        floats = matrices + self.taps * self.channels
        read = Cost(float(FP32 * (self.heads * hidden + load.sequences * floats)))
        multiplied = 6.0 * matrices + 2.0 * self.heads * hidden + 2.0 * self.channels * self.taps
        return total + read + Cost(0.0, rows * multiplied)

    # No device computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of Kimi Delta Attention")


def _latents(which: str) -> str:
    """The rows of the latents of decays, or of gates."""
    return f"{which}_latents"
