"""What goes into a packed store: the content of each of its tensors, streamed out of a checkpoint."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import ml_dtypes
import numpy as np

from hybrid.errors import WeightsError
from hybrid.formats import FORMATS
from hybrid.formats.block import BLOCK, K_ALIGN, Array, Bytes, Floats, all_finite, round_up
from hybrid.formats.packed import interleave, matrix_formats
from hybrid.models.tensors import Gated, GatedBiases, GatedNames, PerHead, Stacked, StoreTensor, bias_name
from hybrid.weights.checkpoints.huggingface import Checkpoint
from hybrid.weights.checkpoints.matrices import Source, TurnedSource

# Of a matrix as float32, read at a time. What stays in the cache packs several times as fast, and intermediates of
# this size are taken from memory that the process keeps, where larger ones are mapped and cleared anew every time.
CHUNK_BYTES = 1 << 18
SMALL_BYTES = 1 << 20  # of a packed tensor that is done about as soon as threads have begun
THREADS = min(4, len(os.sched_getaffinity(0)))  # quantising is arithmetic, and numpy does it outside the lock

Task = Callable[[], Array]  # makes one chunk
Piece = tuple[Source, int, int]  # rows of a matrix


class Content:
    """Packed tensors of one checkpoint. `check`: raise `WeightsError` on a tensor that is not finite.

    Always refused are the few tensors of plain floats (norms, routers, biases, sinks), because one NaN in them spoils
    every token, scales and published codes, and values that would be quantised or would overflow, because no one could
    see it later.
    """

    def __init__(self, checkpoint: Checkpoint, check: bool = False) -> None:
        self._checkpoint = checkpoint
        self._check = check

    def chunks(self, tensor: StoreTensor) -> Iterator[Array]:
        """The stored array in order, in pieces of some MB at most: together `tensor.nbytes`."""
        tasks = self._tasks(tensor)
        return (task() for task in tasks) if tensor.nbytes <= SMALL_BYTES else _in_order(tasks)

    def _tasks(self, tensor: StoreTensor) -> Iterator[Task]:
        match tensor.origin:
            case Gated() as origin:
                experts = range(tensor.nbytes // tensor.shape[-1])
                return (
                    task for expert in experts for task in self._gated(self._checkpoint.gated(origin, expert), tensor)
                )
            case GatedBiases(names, down):
                return iter([partial(self._expert_biases, names, down, tensor)])
            case PerHead() as origin:
                return self._per_head(origin, tensor.format or "")
            case Stacked() as origin:
                if tensor.format is not None:
                    return self._matrix([*self._stacked(origin)], tensor.format)
                if tensor.dtype == "U8":
                    return self._table([*self._stacked(origin)])
                return iter([partial(self._floats, origin, tensor)])

    def _stacked(self, origin: Stacked) -> Iterator[Source]:
        for part in origin.parts:
            if isinstance(part, PerHead):
                yield from self._of_heads(part)
            else:
                yield self._checkpoint.matrix(part)

    def _of_heads(self, origin: PerHead) -> Iterator[Source]:
        for head in range(origin.heads):
            yield self._checkpoint.rows(origin.name, head * origin.of_head + origin.start, origin.rows)

    def _table(self, parts: Sequence[Source]) -> Iterator[Task]:
        """Rows of bf16, one behind the other."""
        for start, stop in _steps(parts, 1):
            yield partial(self._table_rows, list(_pieces(parts, start, stop)))

    def _table_rows(self, pieces: Sequence[Piece]) -> Bytes:
        rows = [self._checked(part.name, part.floats(*span)) for part, *span in pieces]
        values = np.concatenate([some.astype(ml_dtypes.bfloat16) for some in rows])
        self._require_room(pieces, rows, values.view(np.uint8))
        return values.view(np.uint8).reshape(-1)

    def _floats(self, origin: Stacked, tensor: StoreTensor) -> Floats:
        if any(isinstance(part, PerHead) for part in origin.parts):
            read = [(source.name, source.floats(0, source.count)) for source in self._stacked(origin)]
        else:
            names = [bias_name(name) for name in origin.names] if origin.biases else origin.names
            read = [(name, self._checkpoint.read(name)) for name in names]
        for name, values in read if origin.below else ():
            self._require_below(name, values, origin.below)
        parts = [self._checked(name, values, always=True).reshape(-1).astype(np.float32) for name, values in read]
        values = (np.concatenate(parts) + np.float32(origin.plus)) * np.float32(origin.times)
        return np.pad(values, (0, tensor.nbytes // 4 - values.size))

    def _expert_biases(self, names: GatedNames, of_down: bool, tensor: StoreTensor) -> Floats:
        """Padded to whole blocks, those of gate and up in turn as their blocks are."""
        biases = [self._biases_of(names, expert) for expert in range(tensor.shape[0])]
        gate, up, down = (np.stack(part) for part in zip(*biases, strict=True))
        chosen = [down] if of_down else [gate, up]
        padded = [np.pad(part, ((0, 0), (0, -part.shape[1] % BLOCK))) for part in chosen]
        return np.stack([part.reshape(len(part), -1, BLOCK) for part in padded], axis=2)

    def _biases_of(self, names: GatedNames, expert: int) -> list[Floats]:
        found = self._checkpoint.gated_biases(names, expert)
        return [self._checked(name, bias, always=True).astype(np.float32) for name, bias in found]

    def _gated(self, matrices: tuple[Source, ...], tensor: StoreTensor) -> Iterator[Task]:
        """An expert's blob: gate and up interleaved, or up alone, then down."""
        assert tensor.format is not None
        (*wide, down), (first, second) = matrices, matrix_formats(tensor.format)
        if len(wide) == 1:
            yield from self._matrix(wide, first)
        else:
            for both in zip(*(self._matrix([one], first) for one in wide), strict=True):
                yield partial(_interleaved, *both)
        yield from self._matrix([down], second)

    def _per_head(self, origin: PerHead, format: str) -> Iterator[Task]:
        for rows in self._of_heads(origin):
            yield from self._matrix([TurnedSource.of(rows) if origin.turned else rows], format)

    def _matrix(self, parts: Sequence[Source], format: str) -> Iterator[Task]:
        """The blocks of the stacked parts, as they are published if in this format and no block has two parts."""
        parts = [part.packed_as(format) for part in parts]
        whole = all(part.count % BLOCK == 0 for part in parts[:-1])
        straight = whole and all(part.published == format and part.straight for part in parts)
        make = self._published if straight else partial(self._quantised, format)
        for start, stop in _steps(parts, FORMATS[format].row_group):
            yield partial(make, list(_pieces(parts, start, stop)))

    def _published(self, pieces: Sequence[Piece]) -> Bytes:
        return np.concatenate([self._published_rows(*piece) for piece in pieces])

    def _published_rows(self, part: Source, start: int, stop: int) -> Bytes:
        blocks = part.blocks(start, stop)
        looked_at = self._check or part.published != "bf16"  # which keeps what a value is
        if looked_at and not FORMATS[part.published or ""].all_finite(blocks, round_up(part.columns, K_ALIGN)):
            raise self._not_finite(part.name)
        return blocks

    def _quantised(self, format: str, pieces: Sequence[Piece]) -> Bytes:
        lossless = format == "bf16"
        rows = [self._checked(part.name, part.floats(*span), always=not lossless) for part, *span in pieces]
        if len({values.dtype for values in rows}) > 1:
            rows = [values.astype(np.float32) for values in rows]
        try:
            blocks = FORMATS[format].pack(rows[0] if len(rows) == 1 else np.concatenate(rows))
        except ValueError as error:
            raise WeightsError(
                f"{self._checkpoint.path}: tensor {_names(pieces)} cannot be packed in {format}: {error}; take another "
                "--format"
            ) from None
        if lossless and rows[0].dtype == np.float32:  # it has larger values than bf16
            self._require_room(pieces, rows, blocks)
        return blocks

    def _require_room(self, pieces: Sequence[Piece], rows: Sequence[Array], blocks: Bytes) -> None:
        """Raise for values that only packing made infinite; what was not finite before is `_checked`'s concern."""
        if not all_finite(blocks.view(np.uint16)) and all(map(all_finite, rows)):
            raise WeightsError(
                f"{self._checkpoint.path}: tensor {_names(pieces)} holds a value too large for bf16: take "
                "another checkpoint"
            )

    def _checked(self, name: str, values: Array, always: bool = False) -> Array:
        if (self._check or always) and not all_finite(values):
            raise self._not_finite(name)
        return values

    def _require_below(self, name: str, values: Array, below: int) -> None:
        least, most = values.min(), values.max()
        if not 0 <= least <= most < below:
            raise WeightsError(
                f"{self._checkpoint.path}: tensor {name} has numbers from {least:g} to {most:g}, they must be from 0 "
                f"to {below - 1}: take another checkpoint"
            )

    def _not_finite(self, name: str) -> WeightsError:
        return WeightsError(
            f"{self._checkpoint.path}: tensor {name} holds NaN or infinity, weights must be finite: "
            "take another checkpoint"
        )


def _in_order(tasks: Iterator[Task]) -> Iterator[Array]:
    """Results of the tasks, in order; threads run a few tasks ahead."""
    pool, ahead = ThreadPoolExecutor(THREADS), deque[Future[Array]]()
    try:
        for task in tasks:
            ahead.append(pool.submit(task))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _interleaved(gate: Task, up: Task) -> Bytes:
    return interleave(gate(), up())


def _steps(parts: Sequence[Source], row_group: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole groups of rows that cover the stacked parts."""
    step = max(row_group, CHUNK_BYTES // (4 * parts[0].columns) // row_group * row_group)
    total = sum(part.count for part in parts)
    return ((start, min(start + step, total)) for start in range(0, total, step))


def _pieces(parts: Sequence[Source], start: int, stop: int) -> Iterator[Piece]:
    """Rows `start` to `stop` of the parts seen as one matrix: each part with its own rows."""
    for part in parts:
        first, last = max(start, 0), min(stop, part.count)
        if first < last:
            yield part, first, last
        start, stop = start - part.count, stop - part.count


def _names(pieces: Sequence[Piece]) -> str:
    return " or ".join(part.name for part, *_ in pieces)
