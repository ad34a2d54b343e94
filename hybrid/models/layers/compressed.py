"""Attention to the last tokens and to entries that stand for several older ones (DeepSeek-V4).

There is one head of keys, which are the values too; its last dimensions turn, and what attention makes of them is
turned back. Queries are made of latents, and normed without a weight. A row sees the tokens of its window and the
finished entries, all of them or those that an indexer selects, in one softmax with sinks. The output is projected in
two steps, the first of them in groups of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels import KEY_BLOCK, RUN_TOKENS
from hybrid.formats.block import BLOCK, round_up
from hybrid.formats.mix import FormatMix
from hybrid.formats.packed import matrix_formats, packed_bytes
from hybrid.formats.rows import row_stride
from hybrid.models.layers.base import Cost, DeviceNeeds, Extents, Load, Place, StateLayout
from hybrid.models.layers.compressed_names import CompressedFormats, CompressedNames
from hybrid.models.layers.compressed_state import KeyState
from hybrid.models.layers.compressor import BROUGHT, STORED, Compressor, compressor_format, keep
from hybrid.models.layers.entry_indexer import EntryIndexer
from hybrid.models.layers.grouped_query import PART
from hybrid.models.layers.grouped_query_shape import KEY_ALIGN, STATE_EXTRA
from hybrid.models.layers.indexer import SCORES
from hybrid.models.layers.latent import ATTENDED, LOW, LOW_QUERIES, QUERIES
from hybrid.models.layers.latent_shape import heads_together
from hybrid.models.layers.products import (
    BF16,
    FP32,
    NORMED,
    RESIDUAL,
    gemm,
    norm,
    norm_outputs,
    norm_shapes,
    norm_tensors,
    product_cost,
    product_rows,
    quantise,
    rows_buffers,
    rows_name,
)
from hybrid.models.layers.rotary import rope_buffers, rope_constants, rope_name, rope_ops, windows_name, windows_ops
from hybrid.models.layers.side_by_side import Joined, Piece, joined, joined_gemms, joined_tensors
from hybrid.models.layers.turning import Heads, Keys
from hybrid.models.rope import RopeSpec
from hybrid.models.tensors import ExpertForm, Shapes, Shard, Stacked, StoreTensor, in_layer, inside
from hybrid.ops import Buffer, Choice, Op, State, Weight

# Buffers. TURNED: queries, a row for each head. KEYS: of the rows of a step. SEEN, COUNTS: what each row attends to.
# GROUPED: of the output, what groups of heads make.
TURNED, KEYS, SEEN, COUNTS, GROUPED = "turned", "fresh_keys", "seen", "seen_counts", "grouped"
MAX_WINDOW = KEY_BLOCK // 2  # attention counts on it that rows see no more than its key blocks hold


@dataclass(frozen=True)
class CompressedAttention:
    """q_rank: of the latents of queries. rope: of the last dimensions of heads. window: tokens that a row sees, itself
    among them. groups, group_rank: of the output. compressor: None where rows see no more than their window. indexer:
    None where they see all entries.
    """

    heads: int
    head_dim: int
    q_rank: int
    rope: RopeSpec
    window: int
    groups: int
    group_rank: int
    names: CompressedNames
    compressor: Compressor | None = None
    indexer: EntryIndexer | None = None

    @property
    def key_dim(self) -> int:
        return round_up(self.head_dim, KEY_ALIGN)

    @property
    def value_dim(self) -> int:
        return round_up(self.head_dim, BLOCK)

    @property
    def width(self) -> int:
        """Of the queries, and of the output, of all heads."""
        return self.heads * self.head_dim

    @property
    def group_width(self) -> int:
        return self.width // self.groups

    @property
    def low_width(self) -> int:
        return self.q_rank + self.head_dim

    @property
    def compressors(self) -> tuple[Compressor, ...]:
        """Those of attention and of the indexer."""
        own = (self.compressor,) if self.compressor else ()
        return (*own, self.indexer.compressor) if self.indexer else own

    @property
    def kept_keys(self) -> int:
        """How many keys of tokens are kept with a sequence: those that the first token of a run sees, and the run."""
        return self.window + RUN_TOKENS - 1

    @property
    def keys(self) -> KeyState:
        rate = self.compressor.rate if self.compressor else 1
        return KeyState(self.key_dim, self.value_dim, rate)

    @property
    def brought_width(self) -> int:
        """What a token brings to entries of all kinds, values and gates, padded."""
        return row_stride(sum(compressor.columns for compressor in self.compressors))

    @property
    def together(self) -> int:
        """How many heads pass over a block of keys at a time: all have the same."""
        return heads_together(self.heads)

    @property
    def most_seen(self) -> int:
        """Tokens and entries that a row may see."""
        if not self.compressor:
            return self.window
        entries = round_up(self.rope.max_position, KEY_BLOCK) // self.compressor.rate
        return self.window + (self.indexer.selects if self.indexer else entries)

    def within(self, tokens: int) -> Self:
        return self

    # Weights.

    def inside(self, module: str) -> Self:
        return replace(
            self,
            names=inside(self.names, module),
            compressor=self.compressor and self.compressor.inside(module),
            indexer=self.indexer and self.indexer.inside(module),
        )

    def checkpoint_shapes(self, place: Place, form: ExpertForm) -> Shapes:
        names, hidden = in_layer(self.names, place.layer), place.hidden
        yield from norm_shapes(place, names.norm)
        yield names.q_down, (self.q_rank, hidden)
        yield names.q_norm, (self.q_rank,)
        yield names.q_up, (self.width, self.q_rank)
        yield names.kv, (self.head_dim, hidden)
        yield names.kv_norm, (self.head_dim,)
        yield names.sinks, (self.heads,)
        yield names.out_down, (self.groups * self.group_rank, self.group_width)
        yield names.out_up, (hidden, self.groups * self.group_rank)
        if self.compressor:
            yield from self.compressor.checkpoint_shapes(place)
        if self.indexer:
            yield from self.indexer.checkpoint_shapes(place)

    def store_tensors(self, place: Place, shard: Shard) -> Iterator[StoreTensor]:
        names, formats, hidden = in_layer(self.names, place.layer), self._formats(place.mix), place.hidden
        grouped, up = self.groups * self.group_rank, Stacked((names.q_up,))
        yield from norm_tensors(place, shard, "attention.norm", names.norm)
        yield from joined_tensors(self._low(place), "attention", PART, shard, hidden)
        yield shard.floats("attention.q_norm", "norms", Stacked((names.q_norm,)), self.q_rank)
        yield shard.matrix("attention.q_up", PART, up, formats.q_up, self.width, self.q_rank, (2,))
        yield shard.floats("attention.kv_norm", "norms", Stacked((names.kv_norm,)), self.head_dim)
        if self.compressors:
            brought = sum(one.columns for one in self.compressors)
            matrix = Stacked(tuple(name for one in self.compressors for name in one.sources(place.layer)))
            yield shard.matrix("compressor.in", STORED, matrix, compressor_format(place.mix), brought, hidden)
        if self.compressor:
            yield from self.compressor.store_tensors(place, shard)
        if self.indexer:
            yield from self.indexer.store_tensors(place, shard)
        yield shard.floats("attention.sinks", PART, Stacked((names.sinks,)), self.heads)
        down, last = Stacked((names.out_down,)), Stacked((names.out_up,))
        yield shard.matrix("attention.out_down", PART, down, formats.out_down, grouped, self.group_width, (3,))
        yield shard.matrix("attention.out", PART, last, formats.out_up, hidden, grouped, (4,))

    def _formats(self, mix: FormatMix) -> CompressedFormats:
        return CompressedFormats(*matrix_formats(mix.attention, 5))

    def _low(self, place: Place) -> list[Joined]:
        """The matrices of the first projection."""
        names, formats = in_layer(self.names, place.layer), self._formats(place.mix)
        pieces = [Piece("q", (names.q_down,), self.q_rank), Piece("kv", (names.kv,), self.head_dim)]
        return joined("low", pieces, (formats.q_down, formats.kv))

    def formats(self, mix: FormatMix) -> tuple[str, ...]:
        own = (compressor_format(mix),) if self.compressor else ()
        return tuple(dict.fromkeys((*self._formats(mix), *own)))

    # A step.

    def first_ops(self, place: Place) -> Iterator[Op]:
        """The angles of rows, and those of the windows that they are in."""
        yield from rope_ops(place, self.rope)
        if self.compressor:
            yield from windows_ops(place, self.rope, self.compressor.rate)

    def _window_rope(self, place: Place) -> Buffer:
        assert self.compressor
        return Buffer(windows_name(place, self.rope, self.compressor.rate))

    def constants(self, place: Place) -> dict[str, npt.NDArray[np.float32]]:
        return rope_constants(place, self.rope)

    def ops(self, place: Place) -> Iterator[Op]:
        formats, prefix, hidden = self._formats(place.mix), f"layers.{place.layer}.attention", place.hidden
        rope, width = Buffer(rope_name(place, self.rope)), row_stride(self.width)
        heads = Heads(self.heads, self.head_dim, self.rope, rope)
        own = (compressor_format(place.mix),) if self.compressor else ()
        indexes = own if self.indexer else ()
        yield norm(place, PART, f"{prefix}.norm", formats.q_down, formats.kv, *own, f32=self.indexer is not None)
        yield from joined_gemms(self._low(place), prefix, PART, LOW, hidden)
        yield self._norm_queries(place, formats.q_up, *indexes)
        yield gemm(PART, formats.q_up, LOW_QUERIES, f"{prefix}.q_up", QUERIES, self.width, self.q_rank, width)
        keys = Keys((LOW, self.q_rank), row_stride(self.low_width), f"{prefix}.kv_norm", KEYS)
        yield heads.turn(
            place.layer, QUERIES, width, rows_name(TURNED, self.key_dim), self.key_dim, place.eps, keys=keys
        )
        yield from self._compress(place)
        if self.indexer:
            yield from self.indexer.ops(place, rope, self.rope, LOW_QUERIES)
        yield self._see()
        yield self._attend(place)
        yield keep(place, KEYS, self.kept_keys)
        yield heads.unturn(rows_name(ATTENDED, self.group_width))
        yield from self._project(place, formats)

    def _norm_queries(self, place: Place, *formats: str) -> Op:
        plain = norm(place, PART, f"layers.{place.layer}.attention.q_norm").arguments
        outputs = norm_outputs(LOW_QUERIES, self.q_rank, *formats)
        sizes = {"input": Buffer(LOW), "width": self.q_rank, "input_stride": row_stride(self.low_width)}
        return Op("norm", PART, {**plain, **outputs, **sizes}, (0, "rows"))

    def _compress(self, place: Place) -> Iterator[Op]:
        """Entries of the windows that end in this step, and what is kept for those that do not."""
        if not self.compressor:
            return
        format, width, first = compressor_format(place.mix), self.brought_width, 0
        brought, source = sum(one.columns for one in self.compressors), f"layers.{place.layer}.compressor.in"
        yield gemm(PART, format, NORMED, source, BROUGHT, brought, place.hidden, width)
        for indexes, compressor in enumerate(self.compressors):
            yield compressor.compress(place, self._window_rope(place), self.rope, first, width, bool(indexes))
            first += compressor.columns
        yield keep(place, BROUGHT, self.compressor.tokens, width)

    def _see(self) -> Op:
        arguments = {
            "scores": Buffer(SCORES) if self.indexer else None,
            "q": Buffer(rows_name(TURNED, self.key_dim)) if self.indexer else None,
            "seen": Buffer(SEEN),
            "counts": Buffer(COUNTS),
            "window": self.window,
            "stride": self.most_seen,
            "query_stride": self.heads * self.key_dim,
            "rate": self.compressor.rate if self.compressor else 0,
            "selects": self.indexer.selects if self.indexer else 0,
        }
        return Op("see", PART, arguments, (0, "rows"))

    def _attend(self, place: Place) -> Op:
        groups = self.heads // self.together
        arguments: dict[str, Any] = {
            "kv": State(place.layer),
            "heads": self.heads,
            "kv_heads": groups,
            "head_dim": self.head_dim,
            "q": Buffer(rows_name(TURNED, self.key_dim)),
            "output": Buffer(rows_name(ATTENDED, self.group_width)),
            "states": Buffer("states"),
            "sinks": Weight(f"layers.{place.layer}.attention.sinks"),
            "output_stride": self.width,
            "window": 0,
            "scale": self.head_dim**-0.5,
            "selected": Buffer(SEEN),
            "selects": self.most_seen,
            "counts": Buffer(COUNTS),
            "fresh": Buffer(KEYS),
            "kept": self.kept_keys,
        }
        return Op("attention", PART, arguments, (groups, "groups of heads a tile and key block"))

    def _project(self, place: Place, formats: CompressedFormats) -> Iterator[Op]:
        """The output: every group of heads by a matrix of its own, which lie behind each other; then all together."""
        prefix, hidden = f"layers.{place.layer}.attention", place.hidden
        format, width, grouped = formats.out_down, self.group_width, self.groups * self.group_rank
        yield from quantise(PART, ATTENDED, width, format, self.groups)
        rows, stride = product_rows(ATTENDED, width, format)
        arguments = {
            "format": Choice("Format", format),
            "input": rows,
            "weight": Weight(f"{prefix}.out_down"),
            "output": Buffer(rows_name(GROUPED, grouped)),
            "heads": self.groups,
            "columns": self.group_rank,
            "inputs": row_stride(width),
            "input_stride": self.groups * stride,
            "input_head_stride": stride,
            "weight_head_stride": packed_bytes(format, self.group_rank, width),
            "output_stride": row_stride(grouped),
            "output_head_stride": self.group_rank,
        }
        yield Op("head_gemm", PART, arguments, (self.groups * -(-self.group_rank // BLOCK), "column blocks of groups"))
        yield from quantise(PART, GROUPED, grouped, formats.out_up)
        yield gemm(
            PART, formats.out_up, GROUPED, f"{prefix}.out", RESIDUAL, hidden, grouped, row_stride(hidden),
            accumulate=True,
        )  # fmt: skip

    def buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        rows, formats, blocks = extents.rows, self._formats(place.mix), -(-extents.tokens // KEY_BLOCK)
        low, low_bytes = product_rows(LOW_QUERIES, self.q_rank, formats.q_up)
        sizes = {
            LOW: rows * row_stride(self.low_width) * FP32,
            low.name: rows * low_bytes,
            QUERIES: rows * row_stride(self.width) * FP32,
            rows_name(TURNED, self.key_dim): rows * self.heads * self.key_dim * BF16,
            KEYS: rows * self.keys.entry_bytes("bf16"),  # the largest
            SEEN: rows * self.most_seen * 4,
            COUNTS: rows * 4,
            "states": extents.sequences * blocks * self.heads * (self.value_dim + STATE_EXTRA) * FP32,
            **rows_buffers(ATTENDED, self.group_width, formats.out_down, rows * self.groups),
            **rows_buffers(GROUPED, self.groups * self.group_rank, formats.out_up, rows),
            **rope_buffers(place, self.rope, rows),
        }
        own = (compressor_format(place.mix),) if self.compressor else ()
        for format in (formats.q_down, formats.kv, *own):
            sizes |= rows_buffers(NORMED, place.hidden, format, rows)
        if self.compressor:
            sizes[self._window_rope(place).name] = rows * self.rope.dim * FP32
            sizes[BROUGHT] = rows * self.brought_width * FP32
        return sizes | self.indexer.buffers(place, extents, LOW_QUERIES) if self.indexer else sizes

    def state(self, tokens: int, kv_format: str) -> StateLayout:
        keys = self.keys.layout(kv_format, self.kept_keys)
        if not self.compressor:
            return keys
        brought = self.compressor.tokens * self.brought_width * FP32
        return self.keys.with_entries(keys, tokens, self.indexer.key_dim if self.indexer else 0, brought)

    def cost(self, place: Place, load: Load) -> Cost:
        """Of tokens those in the window are read, of entries all that are seen."""
        formats, hidden, rows = self._formats(place.mix), place.hidden, load.rows
        grouped = self.groups * self.group_rank
        sizes = (self.q_rank, hidden), (self.head_dim, hidden), (self.width, self.q_rank), (grouped, self.group_width)
        matrices = zip(formats, (*sizes, (hidden, grouped)), strict=True)
        total = sum((product_cost(format, *size, rows) for format, size in matrices), Cost())
        seen = float(min(load.tokens, load.sequences * self.window))
        pairs = min(load.pairs, float(rows * self.window))
        if self.compressor:
            brought = sum(compressor.columns for compressor in self.compressors)
            total += product_cost(compressor_format(place.mix), brought, hidden, rows)
            most = self.indexer.selects if self.indexer else load.tokens
            entries = min(load.pairs / self.compressor.rate, float(rows * most))
            pairs += entries
            seen += min(load.tokens / self.compressor.rate, entries)
        if self.indexer:
            total += self.indexer.cost(place, load)
        return total + Cost(seen * self.keys.token_bytes(load.kv_format), 4.0 * pairs * self.width)

    # On a device: none computes it.

    def device_needs(self, place: Place) -> DeviceNeeds | None:
        return None

    def device_buffers(self, place: Place, extents: Extents) -> dict[str, int]:
        return {}

    def device_ops(self, ops: Sequence[Op]) -> Iterator[Op]:
        raise ValueError("a device does not know what becomes of attention to compressed tokens")
