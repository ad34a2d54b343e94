"""A gated short convolution: every channel mixes what the last few tokens brought, between two gates.

Its state is of one size, however long a sequence is: what its last tokens brought, as `cpu_kernels` lays it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.products import (
    BF16,
    FP32,
    NORMED,
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
)
from hybrid.models.layers.recurrent import PART, state_layout
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor, bias_name, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight

GATES, CONVOLVED = "gates", "convolved"  # buffers: what goes into the convolution, and what comes out


@dataclass(frozen=True)
class ShortConvNames:
    """Names in a checkpoint. Biases take the name of their weight with `.weight` replaced by `.bias`."""

    norm: str = "model.layers.{layer}.operator_norm.weight"
    into: str = "model.layers.{layer}.conv.in_proj.weight"
    taps: str = "model.layers.{layer}.conv.conv.weight"
    out: str = "model.layers.{layer}.conv.out_proj.weight"


@dataclass(frozen=True)
class ShortConv:
    """width: its channels. taps: tokens that a channel sees, the newest included. bias: of both projections and of the
    convolution.
    """

    width: int
    taps: int
    bias: bool = False
    names: ShortConvNames = field(default_factory=ShortConvNames)

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
        for name, shape in (
            (names.into, (3 * self.width, hidden)),
            (names.taps, (self.width, 1, self.taps)),
            (names.out, (hidden, self.width)),
        ):
            yield name, shape
            if self.bias:
                yield bias_name(name), shape[:1]

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, (into, out), hidden = in_layer(self.names, place.layer), self.formats(place.mix), place.hidden
        yield from norm_tensors(place, shard, "conv.norm", names.norm)
        yield shard.matrix("conv.in", PART, Stacked((names.into,)), into, 3 * self.width, hidden)
        yield shard.floats("conv.taps", PART, Stacked((names.taps,)), self.width, self.taps)
        yield shard.matrix("conv.out", PART, Stacked((names.out,)), out, hidden, self.width, (1,))
        if self.bias:
            yield shard.bias("conv.in_bias", PART, (names.into,), 3 * self.width)
            yield shard.bias("conv.taps_bias", PART, (names.taps,), self.width)
            yield shard.bias("conv.out_bias", PART, (names.out,), hidden)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return matrix_formats(mix.attention)

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        return iter(())

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return {}

    def ops(self, place: Place) -> Iterator[Op]:
        (into, out), prefix, width = self.formats(place.mix), f"layers.{place.layer}.conv", self.width
        hidden, stride = place.hidden, row_stride(3 * width)
        yield norm(place, PART, f"{prefix}.norm", into)
        yield gemm(PART, into, NORMED, f"{prefix}.in", GATES, 3 * width, hidden, stride, bias=self.bias)
        arguments = {
            "input": Buffer(GATES),
            "weight": Weight(f"{prefix}.taps"),
            "bias": Weight(f"{prefix}.taps_bias") if self.bias else None,
            "output": Buffer(rows_name(CONVOLVED, width)),
            "state": State(place.layer),
            "width": width,
            "taps": self.taps,
            "input_stride": stride,
            "output_stride": row_stride(width),
        }
        yield Op("short_conv", PART, arguments, (width, "channels"))
        yield from quantise(PART, CONVOLVED, width, out)
        yield gemm(
            PART, out, CONVOLVED, f"{prefix}.out", RESIDUAL, hidden, width, row_stride(hidden),
            bias=self.bias, accumulate=True,
        )  # fmt: skip

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, (into, out) = extents.rows, self.formats(place.mix)
        return {
            GATES: rows * row_stride(3 * self.width) * FP32,
            **rows_buffers(NORMED, place.hidden, into, rows),
            **rows_buffers(CONVOLVED, self.width, out, rows),
        }

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        return state_layout(0, self.width, self.taps)

    def cost(self, place: Place, load: Load) -> Cost:
        into, out = self.formats(place.mix)
        projections = product_cost(into, 3 * self.width, place.hidden, load.rows)
        projections += product_cost(out, place.hidden, self.width, load.rows)
        state = 1.0 * load.sequences * self.taps * self.width * FP32
        return projections + Cost(state, 2.0 * load.rows * self.width * (self.taps + 2))

    # A step on a device, which projects; the threads convolve, and so the state has one home.

    def device_needs(self, place: Place) -> DeviceNeeds:
        hidden, width = place.hidden, self.width
        norms, biases = hidden * (1 + (place.norm == "layer")), (3 * width + hidden) * self.bias
        weights = 4 * width * hidden * BF16 + (norms + biases) * FP32
        return DeviceNeeds(weights=weights, token=0, row_floats=8 * width, scores=0)

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        found = {op.kind: op for op in ops}
        unknown = set(found) - {"norm", "gemm", "short_conv", "quantise"}
        if unknown:
            raise ValueError(f"a device does not know what becomes of {sorted(unknown)} of a short convolution")
        yield from between_calls(found["short_conv"])
