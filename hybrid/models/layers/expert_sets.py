"""The experts of a layer that one op takes together, and the tables that say which rows each of them gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hybrid.formats.block import BLOCK
from hybrid.formats.packed import down_offset, expert_bytes, matrix_formats
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Place
from hybrid.models.layers.products import NORMED, product_rows, rows_name
from hybrid.ops import Buffer, Choice, Op, RoutingTable, Weight

ROUTED, DENSE, SHARED = "routing", "dense", "shared"  # tables that say which rows an expert gets
IDS, WEIGHTS = "expert_ids", "expert_weights"  # what a router chose, for each (row, rank)
ACTIVATION = "activation"  # what experts make of their rows between their two products


@dataclass(frozen=True)
class Experts:
    """Experts of one format and size: the routed ones, the only one of a dense layer, or the shared one."""

    stored: str  # how the names of the tensors of their layer begin
    name: str  # of their tensor
    format: str  # of their matrices; that of gate and up, and of down, where these differ
    intermediate: int
    routing: str
    rows: int  # that they get for each row of the step
    activation: str  # buffer of what down reads
    bias: bool
    wide: int = 2  # matrices before down: gate and up, or up alone
    source: str = NORMED  # rows that they read
    latent: int = 0  # width of these and of what they make; 0: that of the residual stream

    def width(self, place: Place) -> int:
        """Of the rows that they read, and of what they make."""
        return self.latent or place.hidden

    @property
    def gate_up_format(self) -> str:
        return matrix_formats(self.format)[0]

    @property
    def down_format(self) -> str:
        return matrix_formats(self.format)[1]


def weighed_table(weight: float) -> str:
    """The name of a table that sends every row to one expert, whose result is multiplied by this weight."""
    return DENSE if weight == 1 else f"{DENSE}_times_{weight:g}"


def group_rows(part: str, routing: str, experts: int, top_k: int, routed: bool = True, weight: float = 1.0) -> Op:
    """The op that makes a table. routed: of what a router chose; else one expert takes every row, with this weight."""
    arguments: dict[str, Any] = {
        "ids": Buffer(IDS) if routed else None,
        "weights": Buffer(WEIGHTS) if routed else None,
        "routing": RoutingTable(routing),
        "experts": experts,
        "top_k": top_k,
    }
    if weight != 1:
        arguments["weight"] = weight
    return Op("group", part, arguments, (1, "thread"))


def activation_rows(experts: Experts) -> dict[str, Any]:
    """Where gate_up leaves what the experts make of their rows."""
    width = experts.intermediate
    return {"output": Buffer(rows_name(experts.activation, width)), "output_stride": row_stride(width)}


def expert_set(place: Place, experts: Experts, matrix: str) -> dict[str, Any]:
    """What gate_up or down must know of a group of experts."""
    prefix, width, first = f"layers.{place.layer}.{experts.stored}", experts.width(place), matrix == "gate_up"
    wide, narrow = (experts.intermediate, width) if first else (width, experts.intermediate)
    format = experts.gate_up_format if first else experts.down_format
    rows, stride = product_rows(experts.source if first else experts.activation, narrow, format)
    start = 0 if first else down_offset(experts.format, width, experts.intermediate, experts.wide)
    return {
        "format": Choice("Format", format),
        "input": rows,
        "input_stride": stride,
        "routing": RoutingTable(experts.routing),
        "experts": Weight(f"{prefix}.{experts.name}", start),
        "bias": Weight(f"{prefix}.{matrix}_bias") if experts.bias else None,
        "expert_stride": expert_bytes(experts.format, width, experts.intermediate, experts.wide),
        "blocks": -(-wide // BLOCK),
        "inputs": row_stride(narrow),
    }


def table_buffers(name: str, entries: int, experts: int) -> dict[str, int]:
    """Bytes of the parts of a table."""
    return {
        f"{name}.offsets": (experts + 1) * 4,
        f"{name}.rows": entries * 4,
        f"{name}.weights": entries * 4,
        f"{name}.active": experts * 4,
        f"{name}.count": 4,
    }
