"""Latent attention with a gate for each head: what a head finds is weighed by a sigmoid of the row that looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, as_kind
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.latent import ATTENDED, LatentAttention
from hybrid.models.layers.products import FP32, NORMED_F32, rows_name, score
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor
from hybrid.ops import Buffer, Op

HEAD_GATES = "head_gates"  # buffer: a number for each head


@dataclass(frozen=True)
class GatedLatentAttention(LatentAttention):
    """gates: name in a checkpoint of the matrix [heads, hidden] that makes the gates, kept in fp32 as a router's."""

    gates: str = field(kw_only=True)

    @classmethod
    def of(cls, attention: LatentAttention, gates: str) -> Self:
        """Latent attention whose heads are weighed."""
        return as_kind(cls, attention, gates=gates)

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(super().inside(module), gates=self.gates.replace("model.", f"model.{module}.", 1))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        yield from super().checkpoint_shapes(place, form)
        yield self._name(place), (self.heads, place.hidden)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        yield from super().store_tensors(place, shard)
        yield shard.floats("attention.gates", PART, Stacked((self._name(place),)), self.heads, place.hidden)

    def _name(self, place: Place) -> str:
        return self.gates.replace("{layer}", str(place.layer))

    # A step.

    def _norm_rows(self, place: Place, *formats: str, f32: bool = False) -> Op:
        return super()._norm_rows(place, *formats, f32=True)

    def ops(self, place: Place) -> Iterator[Op]:
        """Gates are made when rows are normed, and weigh what the matrices of values have made."""
        attended = Buffer(rows_name(ATTENDED, self.width))
        for op in super().ops(place):
            yield op
            if op.kind == "norm" and op.arguments["output_f32"]:
                yield score(
                    PART, f"layers.{place.layer}.attention.gates", HEAD_GATES, self.heads, place.hidden, "heads"
                )
            if op.kind == "head_gemm" and op.arguments["output"] == attended:
                yield self._weigh(attended)

    def _weigh(self, attended: Buffer) -> Op:
        arguments = {
            "values": attended,
            "gates": Buffer(HEAD_GATES),
            "heads": self.heads,
            "head_dim": self.value_dim,
            "stride": row_stride(self.width),
            "gate_stride": self.heads,
            "gate_head_stride": 1,
            "per_head": True,
        }
        return Op("gate", PART, arguments, (self.heads, "heads a row"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        own = {
            NORMED_F32: extents.rows * row_stride(place.hidden) * FP32,
            HEAD_GATES: extents.rows * self.heads * FP32,
        }
        return super().buffers(place, extents) | own

    def cost(self, place: Place, load: Load) -> Cost:
        size = self.heads * place.hidden
        return super().cost(place, load) + Cost(float(FP32 * size), 2.0 * load.rows * size)

    # No device computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of latent attention with gates")
