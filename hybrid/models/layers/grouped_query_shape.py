"""The sizes of grouped-query attention: what follows from numbers of heads and dimensions of keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybrid.formats.block import BLOCK, round_up
from hybrid.models.layers.head_gate import HeadGate
from hybrid.models.layers.products import BF16

# Of queries and keys: each head, all heads of a row together, or LayerNorms of each head with weights of its own.
QkNorm = Literal["none", "head", "whole", "apart"]

KEY_ALIGN = 32  # dimensions of a key are padded to this
STATE_EXTRA = BLOCK  # floats behind the sums of a partial softmax: maximum and denominator, padded
SCALE = 4  # bytes of the scale of a key or a value


@dataclass(frozen=True)
class GroupedQueryShape:
    """gate: of what heads attended to. keys_are_values: there is no projection of values, which are the keys before
    norm and rope. value_head_dim: dimensions of a value, None: head_dim.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: QkNorm = field(default="none", kw_only=True)
    gate: HeadGate | None = field(default=None, kw_only=True)
    keys_are_values: bool = field(default=False, kw_only=True)
    value_head_dim: int | None = field(default=None, kw_only=True)

    @property
    def value_size(self) -> int:
        """Dimensions of a value, and of what a head attends to."""
        return self.value_head_dim or self.head_dim

    @property
    def width(self) -> int:
        """Width of the output of all query heads."""
        return self.heads * self.value_size

    @property
    def kv_width(self) -> int:
        """Width of all keys."""
        return self.kv_heads * self.head_dim

    @property
    def values_width(self) -> int:
        """Rows of the projection of values, 0 if there is none."""
        return 0 if self.keys_are_values else self.kv_heads * self.value_size

    @property
    def qkv_width(self) -> int:
        """Rows of the fused projection: all query heads with gates among them, key heads, value heads, other gates."""
        return self.query_width + self.kv_width + self.values_width + self.gate_width

    @property
    def query_width(self) -> int:
        """Rows of the projection of queries."""
        return self.heads * self.head_dim * (2 if self.gate and not self.gate.apart else 1)

    @property
    def gate_width(self) -> int:
        """Rows of the projection of gates; 0 where queries have them among theirs, or there are none."""
        return self.gate.rows(self.heads, self.value_size) if self.gate and self.gate.apart else 0

    @property
    def norm_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the weights of norms, of queries and of keys; none without norms."""
        if self.qk_norm == "none":
            return ()
        if self.qk_norm == "head":
            return ((self.head_dim,),) * 2
        if self.qk_norm == "whole":
            return (self.heads * self.head_dim,), (self.kv_width,)
        return (self.heads, self.head_dim), (self.kv_heads, self.head_dim)

    @property
    def key_dim(self) -> int:
        return round_up(self.head_dim, KEY_ALIGN)

    @property
    def value_dim(self) -> int:
        return round_up(self.value_size, BLOCK)

    @property
    def state_floats(self) -> int:
        """Floats of a row's partial softmaxes."""
        return self.heads * (self.value_dim + STATE_EXTRA)

    def token_bytes(self, kv_format: str) -> int:
        """What one token takes for one KV head: its key and value, padded, and the scales of both if they need any."""
        dims = self.key_dim + self.value_dim
        return dims * BF16 if kv_format == "bf16" else dims + 2 * SCALE
