"""Streams of which each half of a layer reads a mean, every element weighed by a gate (Qwen3.8).

Each stream is normed before, so that halves read normed rows. A product of low rank makes the gates, and beside it the
weights by which a result is added to each stream, of all normed streams of the token. The head reads such a mean too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, Place
from hybrid.models.layers.indexer import index_format
from hybrid.models.layers.products import FP32, gemm, product_cost, quantise, rows_buffers, rows_name
from hybrid.models.streams import STREAMS, WEIGHTS, Streams
from hybrid.models.tensors import Shapes, Shard, Stacked, StoreTensor
from hybrid.ops import Buffer, Op, Weight

# Buffers: all streams of a row, normed; what the first product makes of them, and what of that the second reads; gates.
ROWS, LOW, RANKS, GATES = "stream_rows", "stream_low", "stream_ranks", "stream_gates"
STORED = "streams"  # what its matrices count as


@dataclass(frozen=True)
class GatedStreamNames:
    """Names in a checkpoint: of the norm of all streams, of both matrices that make gates, of that which makes weights;
    the last is empty where nothing is added to streams.
    """

    norm: str
    down: str
    up: str
    weights: str = ""


@dataclass(frozen=True)
class GatedStreams(Streams[GatedStreamNames]):
    """rank: of the product that makes gates."""

    rank: int
    mixed: ClassVar[bool] = False

    def _made(self, spreads: bool) -> int:
        """Columns of the first product."""
        return self.rank + (self.count if spreads else 0)

    def checkpoint_shapes(self, places: Sequence[Place]) -> Shapes:
        wide = self.count * places[0].hidden
        for _, names, _ in self._all(places):
            yield names.norm, (wide,)
            yield names.down, (self.rank, wide)
            yield names.up, (wide, self.rank)
            if names.weights:
                yield names.weights, (self.count, wide)

    def store_tensors(self, places: Sequence[Place]) -> Iterator[StoreTensor]:
        wide = self.count * places[0].hidden
        for prefix, names, place in self._all(places):
            shard, format = Shard("outer").below(prefix), index_format(place.mix)
            down = (names.down, names.weights) if names.weights else (names.down,)
            yield shard.floats("norm", "norms", Stacked((names.norm,), plus=place.norm_plus), wide)
            yield shard.matrix("down", STORED, Stacked(down), format, self._made(bool(names.weights)), wide)
            yield shard.matrix("up", STORED, Stacked((names.up,)), format, wide, self.rank)

    def formats(self, places: Sequence[Place]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(index_format(place.mix) for place in places))

    def _read(self, place: Place, part: str, prefix: str, spreads: bool) -> Iterator[Op]:
        wide, format, made = self.count * place.hidden, index_format(place.mix), self._made(spreads)
        normed = {
            "input": Buffer(STREAMS),
            "weight": Weight(f"{prefix}.norm"),
            "output": Buffer(rows_name(ROWS, wide)),
            "width": wide,
            "groups": self.count,
            "input_stride": row_stride(wide),
            "output_stride": row_stride(wide),
            "eps": place.eps,
        }
        yield Op("group_norm", part, normed, (self.count, "streams a row"))
        yield from quantise(part, ROWS, wide, format)
        yield gemm(part, format, ROWS, f"{prefix}.down", LOW, made, wide, row_stride(made))
        gates = {
            "low": Buffer(LOW),
            "output": Buffer(rows_name(RANKS, self.rank)),
            "weights": Buffer(WEIGHTS) if spreads else None,
            "count": self.count,
            "rank": self.rank,
            "low_stride": row_stride(made),
            "output_stride": row_stride(self.rank),
        }
        yield Op("stream_gates", part, gates, (0, "rows"))
        yield from quantise(part, RANKS, self.rank, format)
        yield gemm(part, format, RANKS, f"{prefix}.up", GATES, wide, self.rank, row_stride(wide))
        own = {"norm": Weight(f"{prefix}.norm"), "gates": Buffer(GATES), "gate_stride": row_stride(wide)}
        yield self._collapse(place, part, spreads, **own)

    def buffers(self, places: Sequence[Place], rows: int) -> dict[str, int]:
        wide, sizes = self.count * places[0].hidden, super().buffers(places, rows)
        sizes |= {LOW: rows * row_stride(self._made(spreads=True)) * FP32, GATES: rows * row_stride(wide) * FP32}
        for format in self.formats(places):
            sizes |= rows_buffers(ROWS, wide, format, rows) | rows_buffers(RANKS, self.rank, format, rows)
        return sizes

    def cost(self, places: Sequence[Place], rows: int) -> Cost:
        wide, total = self.count * places[0].hidden, Cost()
        for _, names, place in self._all(places):
            format = index_format(place.mix)
            total += product_cost(format, self._made(bool(names.weights)), wide, rows)
            total += product_cost(format, wide, self.rank, rows)
        return total
