"""The gate of attention: what its heads attended to is multiplied by a function of the rows that it read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybrid.formats.rows import row_stride
from hybrid.models.layers.products import FP32, rows_name
from hybrid.ops import Buffer, Op

GateFunction = Literal["sigmoid", "softplus"]


@dataclass(frozen=True)
class HeadGate:
    """function: of the gate. per_head: all values of a head share one; else each has its own. apart: its projection is
    a matrix of its own, whose products lie behind values; else each head's lies behind its query, of the same size.
    """

    function: GateFunction = "sigmoid"
    per_head: bool = False
    apart: bool = False

    def rows(self, heads: int, head_dim: int) -> int:
        """Rows of the projection."""
        return heads * (1 if self.per_head else head_dim)

    def op(self, part: str, heads: int, head_dim: int, qkv_width: int) -> Op:
        """What heads attended to, gated in place. qkv_width: of all products side by side, this gate's among them."""
        own = 1 if self.per_head else head_dim
        first = qkv_width - self.rows(heads, head_dim) if self.apart else head_dim
        arguments = {
            "values": Buffer(rows_name("attended", heads * head_dim)),
            "gates": Buffer("qkv", first * FP32),
            "heads": heads,
            "head_dim": head_dim,
            "stride": row_stride(heads * head_dim),
            "gate_stride": row_stride(qkv_width),
            "gate_head_stride": own if self.apart else 2 * head_dim,
        }
        flags = {"softplus": self.function == "softplus", "per_head": self.per_head}
        arguments |= {name: True for name, value in flags.items() if value}
        return Op("gate", part, arguments, (heads, "heads a row"))
