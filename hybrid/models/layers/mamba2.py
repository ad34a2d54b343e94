"""Mamba-2: every head has a matrix that each token multiplies by a decay and adds to; heads share what they read by.

The state of a sequence is of one size: the matrices of all heads with the tokens that are not yet written into them,
then what the short convolution keeps, both as `cpu_kernels` lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.products import (
    FP32,
    NORMED,
    NORMED_F32,
    RESIDUAL,
    gemm,
    norm,
    norm_shapes,
    norm_tensors,
    product_cost,
    quantise,
    rows_buffers,
    rows_name,
    score,
)
from hybrid.models.layers.recurrent import PART, convolve, state_layout
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import (
    ExpertForm,
    PerHead,
    Shapes,
    Shard,
    Stacked,
    StoreTensor,
    bias_name,
    in_layer,
    inside,
)
from hybrid.ops import Buffer, Op, State, Weight

# Buffers: x of all heads, B and C of all groups, gates of all heads; one step a head; what comes out, normed.
PROJECTED, STEPS, FOUND = "projected", "steps", "found"
LARGEST_STEP = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Mamba2Names:
    """Names in a checkpoint. The bias of the convolution takes the name of its weight with `.weight` replaced by
    `.bias`.
    """

    norm: str = "model.layers.{layer}.input_layernorm.weight"
    into: str = "model.layers.{layer}.mamba.in_proj.weight"
    taps: str = "model.layers.{layer}.mamba.conv1d.weight"
    step_bias: str = "model.layers.{layer}.mamba.dt_bias"
    decay_rate: str = "model.layers.{layer}.mamba.A_log"
    skip: str = "model.layers.{layer}.mamba.D"
    group_norm: str = "model.layers.{layer}.mamba.norm.weight"
    out: str = "model.layers.{layer}.mamba.out_proj.weight"


@dataclass(frozen=True)
class Mamba2:
    """Adjacent heads share the B and C of a group, of `state_dim` numbers each; what comes out of the heads of a group
    is normed together, behind its gates. taps: tokens that a channel of the convolution sees, the newest included.
    limits: of the steps. conv_bias: whether the convolution has one. eps: of the norm of groups; None: of all norms.
    """

    heads: int
    head_dim: int
    groups: int
    state_dim: int
    taps: int
    conv_bias: bool = True
    limits: tuple[float, float] = (0.0, LARGEST_STEP)
    eps: float | None = None
    names: Mamba2Names = field(default_factory=Mamba2Names)

    @property
    def inner(self) -> int:
        """Width of x, and of its gates."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_dim

    @property
    def width(self) -> int:
        """Rows of the projection: what is convolved, then gates."""
        return self.channels + self.inner

    @property
    def rope(self) -> RopeSpec | None:
        return None

    def within(self, tokens: int) -> Self:
        return self

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden = in_layer(self.names, place.layer), place.hidden
        yield from norm_shapes(place, names.norm)
        yield names.into, (self.width + self.heads, hidden)
        yield names.taps, (self.channels, 1, self.taps)
        if self.conv_bias:
            yield bias_name(names.taps), (self.channels,)
        for name in (names.step_bias, names.decay_rate, names.skip):
            yield name, (self.heads,)
        yield names.group_norm, (self.inner,)
        yield names.out, (hidden, self.inner)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, (into, out), hidden = in_layer(self.names, place.layer), self.formats_of(place.mix), place.hidden
        yield from norm_tensors(place, shard, "mamba.norm", names.norm)
        yield shard.matrix("mamba.in", PART, self._rows(names, (self.inner, self.channels), (0, self.inner)), into,
                           self.width, hidden)  # fmt: skip
        yield shard.floats("mamba.steps", PART, self._rows(names, (self.width, self.heads)), self.heads, hidden)
        yield shard.floats("mamba.taps", PART, Stacked((names.taps,)), self.channels, self.taps)
        if self.conv_bias:
            yield shard.floats("mamba.taps_bias", PART, Stacked((names.taps,), biases=True), self.channels)
        for name in ("step_bias", "decay_rate", "skip"):
            yield shard.floats(f"mamba.{name}", PART, Stacked((getattr(names, name),)), self.heads)
        yield shard.floats("mamba.group_norm", "norms", Stacked((names.group_norm,)), self.inner)
        yield shard.matrix("mamba.out", PART, Stacked((names.out,)), out, hidden, self.inner, (1,))

    def _rows(self, names: Mamba2Names, *parts: tuple[int, int]) -> Stacked:
        """Rows of the projection, which has gates first, then what is convolved, then steps: from where, and how many
        of them.
        """
        whole = self.width + self.heads
        return Stacked(tuple(PerHead(names.into, 1, whole, start, count) for start, count in parts))

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return self.formats_of(mix)

    def formats_of(self, mix: FormatMix) -> tuple[str, str]:
        """Of the matrices of the projection and of the output."""
        into, out = matrix_formats(mix.attention)
        return into, out

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {}

    def ops(self, place: Place) -> Iterator[Op]:
        (into, out), prefix, hidden = self.formats_of(place.mix), f"layers.{place.layer}.mamba", place.hidden
        stride = row_stride(self.width)
        yield norm(place, PART, f"{prefix}.norm", into, f32=True)
        yield gemm(PART, into, NORMED, f"{prefix}.in", PROJECTED, self.width, hidden, stride)
        yield score(PART, f"{prefix}.steps", STEPS, self.heads, hidden, "heads")
        yield convolve(
            place.layer, PROJECTED, f"{prefix}.taps", self._matrix_bytes(), self.channels, self.taps, stride,
            bias=self.conv_bias,
        )  # fmt: skip
        yield self._scan(place, prefix, stride)
        yield self._norm_groups(place, prefix, stride)
        yield from quantise(PART, FOUND, self.inner, out)
        yield gemm(PART, out, FOUND, f"{prefix}.out", RESIDUAL, hidden, self.inner, row_stride(hidden), accumulate=True)

    def _scan(self, place: Place, prefix: str, stride: int) -> Op:
        arguments = {
            "values": Buffer(PROJECTED),
            "steps": Buffer(STEPS),
            "bias": Weight(f"{prefix}.step_bias"),
            "rate": Weight(f"{prefix}.decay_rate"),
            "skip": Weight(f"{prefix}.skip"),
            "state": State(place.layer),
            "heads": self.heads,
            "groups": self.groups,
            "head_dim": self.head_dim,
            "state_dim": self.state_dim,
            "stride": stride,
            "step_stride": self.heads,
            "smallest": self.limits[0],
            "largest": self.limits[1],
        }
        return Op("state_space", PART, arguments, (self.heads, "heads"))

    def _norm_groups(self, place: Place, prefix: str, stride: int) -> Op:
        arguments = {
            "input": Buffer(PROJECTED),
            "weight": Weight(f"{prefix}.group_norm"),
            "output": Buffer(rows_name(FOUND, self.inner)),
            "width": self.inner,
            "groups": self.groups,
            "input_stride": stride,
            "output_stride": row_stride(self.inner),
            "eps": place.eps if self.eps is None else self.eps,
        }
        return Op("group_norm", PART, arguments, (self.groups, "groups a row"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, (into, out) = extents.rows, self.formats_of(place.mix)
        return {
            PROJECTED: rows * row_stride(self.width) * FP32,
            STEPS: rows * self.heads * FP32,
            NORMED_F32: rows * row_stride(place.hidden) * FP32,
            **rows_buffers(NORMED, place.hidden, into, rows),
            **rows_buffers(FOUND, self.inner, out, rows),
        }

    def _matrix_bytes(self) -> int:
        return int(cpu_kernels.delta_state_bytes(self.heads, self.state_dim, self.head_dim))

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        return state_layout(self._matrix_bytes(), self.channels, self.taps)

    def cost(self, place: Place, load: Load) -> Cost:
        """Each token multiplies the matrices twice: by its C, and dt x by its B."""
        (into, out), hidden, rows = self.formats_of(place.mix), place.hidden, load.rows
        projections = product_cost(into, self.width, hidden, rows) + product_cost(out, hidden, self.inner, rows)
        matrices, scores = self.inner * self.state_dim, self.heads * hidden
        floats = matrices + self.taps * self.channels
        read = Cost(float(FP32 * (scores + load.sequences * floats)))
        return projections + read + Cost(0.0, rows * (4.0 * matrices + 2.0 * scores + 2.0 * self.channels * self.taps))

    # No device computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("no device computes Mamba-2")
