"""Experts that read latents of the rows, and whose sum is projected back; the shared one reads the rows themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, as_kind
from hybrid.models.layers.expert_sets import Experts
from hybrid.models.layers.feed_forward import FeedForward
from hybrid.models.layers.products import (
    FP32,
    NORMED,
    RESIDUAL,
    UNNORMED_WEIGHT,
    as_rows,
    gemm,
    norm,
    product_cost,
    product_rows,
    rows_buffers,
)
from hybrid.models.layers.router import route
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor, in_layer
from hybrid.ops import Buffer, Op

PART = "dense"  # of the weights of both projections, whose formats are those of dense gate and up, and of down
# Buffers: latents, the sum of what experts make of them, and the weights of a norm that leaves both as they are.
LATENTS, SUM, ONES = "expert_latents", "latent_sum", "unnormed_expert_latents"


@dataclass(frozen=True)
class LatentExperts(FeedForward):
    """latent: width of what experts read and make."""

    latent: int = field(kw_only=True)

    @classmethod
    def of(cls, experts: FeedForward, latent: int) -> Self:
        return as_kind(cls, experts, latent=latent)

    def width(self, place: Place) -> int:
        return self.latent

    # Weights.

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        yield from super().checkpoint_shapes(place, form)
        names = in_layer(self.names, place.layer)
        yield names.latent_down, (self.latent, place.hidden)
        yield names.latent_up, (place.hidden, self.latent)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        yield from super().store_tensors(place, shard)
        names, (down, up), shard = in_layer(self.names, place.layer), _formats(place.mix), shard.below(self.stored)
        yield shard.matrix("latent_down", PART, Stacked((names.latent_down,)), down, self.latent, place.hidden)
        yield shard.matrix("latent_up", PART, Stacked((names.latent_up,)), up, place.hidden, self.latent, (1,))

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return super().formats(mix) + _formats(mix)

    def groups(self, mix: FormatMix) -> list[Experts]:
        routed, *shared = super().groups(mix)
        return [replace(routed, source=LATENTS, latent=self.latent), *shared]

    # A step.

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return super().constants(place) | {ONES: np.full(self.latent, UNNORMED_WEIGHT, np.float32)}

    def ops(self, place: Place) -> Iterator[Op]:
        routed, *shared = self.groups(place.mix)
        prefix, hidden, (down, up) = self.prefix(place), place.hidden, _formats(place.mix)
        stride = row_stride(self.latent)
        yield norm(place, "moe", f"{prefix}.norm", down, *(one.gate_up_format for one in shared), f32=True)
        yield gemm("moe", down, NORMED, f"{prefix}.latent_down", LATENTS, self.latent, hidden, stride)
        yield as_rows("moe", Buffer(LATENTS), stride, ONES, LATENTS, self.latent, routed.gate_up_format, cleared=SUM)
        if self.router:  # behind the latents: a device that holds experts reads them from here on
            yield from route(self.router, prefix, hidden, self.experts, self.shared_gate)
        yield from self.products(place, [routed], SUM)
        yield as_rows("moe", Buffer(SUM), stride, ONES, SUM, self.latent, up)
        yield gemm(
            "moe", up, SUM, f"{prefix}.latent_up", RESIDUAL, hidden, self.latent, row_stride(hidden), accumulate=True
        )
        if shared:
            yield from self.products(place, shared, RESIDUAL)

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, (down, up) = extents.rows, _formats(place.mix)
        sizes = super().buffers(place, extents) | rows_buffers(NORMED, place.hidden, down, rows)
        summed, size = product_rows(SUM, self.latent, up)
        floats = rows * row_stride(self.latent) * FP32
        return sizes | {LATENTS: floats, SUM: floats, summed.name: rows * size, ONES: self.latent * FP32}

    def cost(self, place: Place, load: Load) -> Cost:
        down, up = _formats(place.mix)
        projections = product_cost(down, self.latent, place.hidden, load.rows)
        return super().cost(place, load) + projections + product_cost(up, place.hidden, self.latent, load.rows)

    # No device computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of experts that read latents")


def _formats(mix: FormatMix) -> tuple[str, ...]:
    """Of the projection to latents, and of that back."""
    return matrix_formats(mix.dense)
