"""What a large table says of a token and those before it, added to the streams of the residual (Qwen3.8's PLE).

Each n-gram that ends with a token, of two tokens and up, is hashed to a row in each of several parts of the table.
These rows together make a key for each stream and one value; each stream takes as much of the value as it is like its
key, and what a causal convolution over every few tokens makes of that. Of the table a token reads these rows alone: it
lies in the store as rows of bf16, which are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

import cpu_kernels
from hybrid.formats.block import round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.gated_delta import GatedDeltaNet
from hybrid.models.layers.indexer import index_format
from hybrid.models.layers.products import BF16, FP32, gemm, product_cost, quantise, rows_buffers, rows_name
from hybrid.models.layers.recurrent import LINE, PART
from hybrid.models.streams import STREAMS
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Op, State, Weight

# Buffers: rows of the table, by number and side by side; keys and the value; how much streams take.
IDS, LOOKED_UP, MADE, TAKEN = "ngram_ids", "ngram_rows", "ngram_made", "ngram_gates"
STORED = "streams"  # what its matrices count as


@dataclass(frozen=True)
class NgramNames:
    """Names in a checkpoint. table: of its pieces, with the place of their number."""

    table: str = "model.layers.{layer}.ple.ple_embedding.ngram_embedding.shard_{shard}.weight"
    keys: str = "model.layers.{layer}.ple.key_proj.weight"
    value: str = "model.layers.{layer}.ple.value_proj.weight"
    key_norm: str = "model.layers.{layer}.ple.norm_key.weight"
    query_norm: str = "model.layers.{layer}.ple.norm_query.weight"
    value_norm: str = "model.layers.{layer}.ple.norm_conv.weight"
    taps: str = "model.layers.{layer}.ple.conv1d.weight"


@dataclass(frozen=True)
class NgramTable:
    """streams, hidden: of the residual, and the width of each. size: tokens of the longest n-gram. heads: parts of the
    table for each length. dim: of a row. parts: rows of each part. rows: of the table. shards: pieces that a checkpoint
    has of it. factors: of tokens in a hash, the newest token's first. end: the token that ends a text. taps: tokens
    that a channel of the convolution sees, `size` apart, the newest included.
    """

    streams: int
    hidden: int
    size: int
    heads: int
    dim: int
    parts: tuple[int, ...]
    rows: int
    shards: int
    factors: tuple[int, ...]
    end: int
    taps: int
    names: NgramNames = field(default_factory=NgramNames)

    @property
    def width(self) -> int:
        """Of all rows of a token side by side."""
        return len(self.parts) * self.dim

    def inside(self, module: str) -> Self:
        return replace(self, names=inside(self.names, module))

    @property
    def wide(self) -> int:
        """Of all streams together."""
        return self.streams * self.hidden

    @property
    def made(self) -> int:
        """Columns of keys and value."""
        return self.wide + self.hidden

    # Weights.

    def _pieces(self, place: Place) -> Iterator[tuple[str, int]]:
        """Names of the pieces of the table, and their rows: as many in each as can be, but for the last."""
        name, each = in_layer(self.names, place.layer).table, -(-self.rows // self.shards)
        for shard, first in enumerate(range(0, self.rows, each)):
            yield name.replace("{shard}", str(shard)), min(each, self.rows - first)

    def checkpoint_shapes(self, place: Place) -> Shapes:
        names, wide = in_layer(self.names, place.layer), self.wide
        for name, rows in self._pieces(place):
            yield name, (rows, self.dim)
        yield names.keys, (wide, self.width)
        yield names.value, (self.hidden, self.width)
        for name in (names.key_norm, names.query_norm, names.value_norm):
            yield name, (wide,)
        yield names.taps, (wide, 1, self.taps)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, wide, shard = in_layer(self.names, place.layer), self.wide, shard.below("ngrams")
        table = Stacked(tuple(name for name, _ in self._pieces(place)))
        yield shard.table("table", "embedding", table, self.rows, self.dim)
        matrix = Stacked((names.keys, names.value))
        yield shard.matrix("made", STORED, matrix, index_format(place.mix), self.made, self.width)
        for which in ("key_norm", "query_norm", "value_norm"):
            yield shard.floats(which, "norms", Stacked((getattr(names, which),), plus=place.norm_plus), wide)
        yield shard.floats("taps", STORED, Stacked((names.taps,)), wide, self.taps)

    # A step.

    def _hash(self, place: Place) -> str:
        return f"ngram_hash{place.layer}"

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        """Factors, and of each part its rows and the first of them: the bits of 64-bit integers."""
        firsts = np.concatenate([[0], np.cumsum(self.parts)[:-1]])
        numbers = np.concatenate([np.array(self.factors, np.int64), np.array(self.parts, np.int64), firsts])
        return {self._hash(place): numbers.astype(np.int64).view(np.float32)}

    def ops(self, place: Place, state: int) -> Iterator[Op]:
        """state: bytes of the layer's state before its own."""
        prefix, made, wide = f"layers.{place.layer}.ngrams", row_stride(self.made), self.wide
        format, parts = index_format(place.mix), len(self.parts)
        hashed = {
            "hash": Buffer(self._hash(place)),
            "ids": Buffer(IDS),
            "state": State(place.layer, state + self.conv_bytes),
            "size": self.size,
            "heads": self.heads,
            "end": self.end,
        }
        yield Op("ngrams", PART, hashed, (1, "thread"))
        looked_up = {
            "table": Weight(f"{prefix}.table"),
            "ids": Buffer(IDS),
            "output": Buffer(rows_name(LOOKED_UP, self.width)),
            "dim": self.dim,
            "count": parts,
            "output_stride": row_stride(self.width),
        }
        yield Op("lookup", PART, looked_up, (parts, "parts a row"))
        yield from quantise(PART, LOOKED_UP, self.width, format)
        yield gemm(PART, format, LOOKED_UP, f"{prefix}.made", MADE, self.made, self.width, made)
        gates = {
            "projected": Buffer(MADE),
            "streams": Buffer(STREAMS),
            "key_norm": Weight(f"{prefix}.key_norm"),
            "query_norm": Weight(f"{prefix}.query_norm"),
            "gates": Buffer(TAKEN),
            "count": self.streams,
            "width": self.hidden,
            "projected_stride": made,
            "stream_stride": row_stride(wide),
            "eps": place.eps,
        }
        yield Op("ngram_gate", PART, gates, (0, "rows"))
        convolved = {
            "values": Buffer(MADE, wide * FP32),
            "gates": Buffer(TAKEN),
            "norm": Weight(f"{prefix}.value_norm"),
            "weight": Weight(f"{prefix}.taps"),
            "streams": Buffer(STREAMS),
            "state": State(place.layer, state),
            "count": self.streams,
            "width": wide,
            "taps": self.taps,
            "dilation": self.size,
            "value_stride": made,
            "stream_stride": row_stride(wide),
        }
        yield Op("ngram_conv", PART, convolved, (wide, "channels"))

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, format, parts = extents.rows, index_format(place.mix), len(self.parts)
        return {
            self._hash(place): (len(self.factors) + 2 * parts) * 8,
            IDS: rows * parts * 4,
            **rows_buffers(LOOKED_UP, self.width, format, rows),
            MADE: rows * row_stride(self.made) * FP32,
            TAKEN: rows * 2 * self.streams * FP32,
        }

    @property
    def conv_bytes(self) -> int:
        """What the convolution keeps of a sequence."""
        return round_up(int(cpu_kernels.conv_state_bytes(self.wide, self.taps, self.size)), LINE)

    @property
    def state_bytes(self) -> int:
        """That, and then the last tokens."""
        return self.conv_bytes + round_up(int(cpu_kernels.ngram_state_bytes(self.size)), LINE)

    def cost(self, place: Place, load: Load) -> Cost:
        wide = self.wide
        total = product_cost(index_format(place.mix), self.made, self.width, load.rows)
        read = load.rows * self.width * BF16 + load.sequences * wide * self.taps * FP32
        return total + Cost(float(read), 2.0 * load.rows * wide * (self.taps + 4))


@dataclass(frozen=True)
class NgramDeltaNet(GatedDeltaNet):
    """Gated DeltaNet before which a table of n-grams adds to the streams."""

    ngrams: NgramTable = field(kw_only=True)

    def inside(self, module: str) -> Self:
        return replace(super().inside(module), ngrams=self.ngrams.inside(module))

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        yield from self.ngrams.checkpoint_shapes(place)
        yield from super().checkpoint_shapes(place, form)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        yield from self.ngrams.store_tensors(place, shard)
        yield from super().store_tensors(place, shard)

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().formats(mix), index_format(mix))))

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return super().constants(place) | self.ngrams.constants(place)

    def stream_ops(self, place: Place) -> Iterator[Op]:
        yield from self.ngrams.ops(place, super().state(0, "").nbytes)

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return super().buffers(place, extents) | self.ngrams.buffers(place, extents)

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        """Behind that of the delta rule."""
        own = super().state(tokens, kv_format)
        return replace(own, nbytes=own.nbytes + self.ngrams.state_bytes)

    def cost(self, place: Place, load: Load) -> Cost:
        return super().cost(place, load) + self.ngrams.cost(place, load)

    # No device computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:  # type: ignore[override]
        return None

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of n-grams")
