"""Ops on heads of which some dimensions turn: before attention, and back behind it (DeepSeek-V4)."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.products import FP32
from hybrid.models.rope import RopeSpec
from hybrid.ops import Buffer, Op, State, Weight


@dataclass(frozen=True)
class Keys:
    """Of tokens, normed and turned beside the queries. source: a buffer and the first of its floats in a row, of
    `stride`. norm: its weight. made: the buffer for keys as they are kept.
    """

    source: tuple[str, int]
    stride: int
    norm: str
    made: str


@dataclass(frozen=True)
class Heads:
    """So many of `dim` dimensions, of which the last turn as `rope` says by the angles in `table`, or with
    `turns_first` the first; none without it.
    """

    count: int
    dim: int
    rope: RopeSpec | None
    table: Buffer | None
    turns_first: bool = False

    def turn(
        self,
        layer: int,
        queries: str,
        stride: int,
        q: str,
        padded_dim: int,
        eps: float,
        *,
        keys: Keys | None = None,
        norm: str = "",
    ) -> Op:
        """queries: of rows of `stride` floats, to the buffer `q` of heads of `padded_dim`. Beside keys they are
        normed without a weight. norm: that by which they are.
        """
        arguments = {
            "queries": Buffer(queries),
            "keys": Buffer(keys.source[0], keys.source[1] * FP32) if keys else None,
            "rope": self.table,
            "norm": Weight(keys.norm) if keys else None,
            "q": Buffer(q),
            "made": Buffer(keys.made) if keys else None,
            "kv": State(layer),
            "heads": self.count,
            "head_dim": self.dim,
            "padded_dim": padded_dim,
            "rope_dim": self.rope.dim if self.rope else 0,
            "interleaved": bool(self.rope and self.rope.interleaved),
            "normed": keys is not None,
            "query_stride": stride,
            "key_stride": keys.stride if keys else 0,
            "eps": eps,
        }
        if norm:
            arguments["query_norm"] = Weight(norm)
        if self.turns_first:
            arguments["turns_first"] = True
        return Op("turn", PART, arguments, (self.count + bool(keys), "heads a row"))

    def unturn(self, values: str) -> Op:
        """Rows of the values of all heads, bf16, in place."""
        arguments = {
            "values": Buffer(values),
            "rope": self.table,
            "heads": self.count,
            "head_dim": self.dim,
            "rope_dim": self.rope.dim if self.rope else 0,
            "interleaved": bool(self.rope and self.rope.interleaved),
            "stride": self.count * self.dim,
        }
        return Op("unturn", PART, arguments, (self.count, "heads a row"))
