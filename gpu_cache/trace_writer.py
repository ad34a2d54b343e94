"""Writes a trace while an engine runs, into a file that is committed when it is whole, whatever ends the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import COLUMNS, NEXT_EXPERT, Trace, import_parquet

_ROWS_BUFFERED = 1 << 16


class Target(Protocol):
    """An open file that is committed once it is whole, or discarded. What fails raises OSError."""

    @property
    def file(self) -> BinaryIO: ...
    def commit(self) -> None: ...
    def discard(self) -> None: ...


class Sink(Protocol):
    """Writes rows as they come: integers has the columns of a trace but the score, and `next_expert` last if it is
    written. What fails raises OSError, what it cannot hold CacheError.
    """

    def write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class TraceWriter:
    """A context manager; leaving it, by an exception too, commits the file with every row written so far.

    When the disk fills or fails, `warn` gets one line that begins with `name`, the file is discarded and later rows are
    dropped: a run never ends because of its trace. sink: writes another format than CSV or parquet. next_expert: write
    this column, too, which other formats do not have. Raises CacheError for parquet where it is not installed.
    """

    def __init__(
        self,
        target: Target,
        name: str,
        warn: Callable[[str], None],
        parquet: bool = False,
        sink: Callable[[BinaryIO], Sink] | None = None,
        next_expert: bool = False,
    ) -> None:
        self._target, self._name, self._warn = target, name, warn
        self._blocks: list[NDArray[np.float64]] = []
        self._scores: list[NDArray[np.float32]] = []
        self._buffered = 0
        self._next_expert = next_expert and sink is None
        self._sink = sink(target.file) if sink else _sink(target.file, parquet, self._next_expert)
        self._failed = False

    def write(
        self,
        step: int,
        layer: int,
        sequence: ArrayLike,
        position: ArrayLike,
        expert: Any,
        score: Any,
        named: Any = None,
    ) -> None:
        """Append the rows of one (step, layer). sequence, position: (tokens,); expert, score: (tokens, top_k); named:
        the same of what the next layer's router says, None where it was not asked.
        """
        if self._failed:
            return
        tokens, top_k = np.shape(expert)
        block = np.empty((6 + self._next_expert, tokens, top_k), np.int64)
        block[0], block[3], block[4] = step, layer, np.arange(top_k)
        block[1], block[2] = np.reshape(sequence, (-1, 1)), np.reshape(position, (-1, 1))
        block[5] = expert
        if self._next_expert:
            block[6] = -1 if named is None else named
        self._blocks.append(block.reshape(len(block), -1))
        self._scores.append(np.array(score, np.float32).reshape(-1))
        self._buffered += tokens * top_k
        if self._buffered >= _ROWS_BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        if self._blocks and not self._failed:
            integers, scores = np.concatenate(self._blocks, axis=1), np.concatenate(self._scores)
            self._failed = not self._try(lambda: self._write(integers, scores))
        self._blocks, self._scores, self._buffered = [], [], 0

    def close(self) -> None:
        """Write what is left and give the file its name; more calls do nothing."""
        self.flush()
        if not self._failed:
            self._failed = not self._try(self._finish)
        self._failed = True

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None:
        self._sink.write(integers, scores)

    def _finish(self) -> None:
        self._sink.close()
        self._target.commit()

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except (OSError, CacheError) as error:
            reason = getattr(error, "strerror", None) or error
            self._warn(f"{self._name}: the trace is not written ({reason}); the run goes on without")
            self._sink.abandon()
            self._target.discard()
            return False
        return True


class _CsvSink:
    def __init__(self, file: BinaryIO, columns: Sequence[str]) -> None:
        self._file = file
        self._line = ",".join("%s" if name == "score" else "%d" for name in columns) + "\n"
        file.write((",".join(columns) + "\n").encode())

    def write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None:
        """Scores are written so that reading gives the same float32."""
        cells = zip(*_in_order(integers.tolist(), scores.astype(str).tolist()), strict=True)
        self._file.write("".join(map(self._line.__mod__, cells)).encode())
        self._file.flush()

    def close(self) -> None:
        """Nothing follows the rows."""

    def abandon(self) -> None:
        """Nothing is held but the file."""


class _ParquetSink:
    def __init__(self, file: BinaryIO, columns: Sequence[str]) -> None:
        parquet = import_parquet()
        import pyarrow

        fields = [(name, pyarrow.float32() if name == "score" else pyarrow.int64()) for name in columns]
        self._schema = pyarrow.schema(fields)
        self._writer = parquet.ParquetWriter(file, self._schema)

    def write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.table(_in_order([*integers], scores), schema=self._schema))

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._writer.close()


def _sink(file: BinaryIO, parquet: bool, next_expert: bool) -> Sink:
    columns = (*COLUMNS, NEXT_EXPERT) if next_expert else COLUMNS
    return _ParquetSink(file, columns) if parquet else _CsvSink(file, columns)


def _in_order(integers: list[Any], scores: Any) -> list[Any]:
    """The columns as a file has them: the score is the last of `COLUMNS`."""
    return [*integers[: len(COLUMNS) - 1], scores, *integers[len(COLUMNS) - 1 :]]


def write_trace(
    file: BinaryIO, trace: Trace, parquet: bool = False, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a whole trace. progress: called with rows done and all rows. Raises CacheError for parquet where it is not
    installed, and OSError.
    """
    more = trace.next_expert is not None
    sink = _sink(file, parquet, more)
    integers = np.array([getattr(trace, name) for name in (*COLUMNS[:-1], NEXT_EXPERT)[: len(COLUMNS) - 1 + more]])
    for first in range(0, len(trace), _ROWS_BUFFERED):
        part = slice(first, first + _ROWS_BUFFERED)
        sink.write(integers[:, part], trace.score[part])
        if progress is not None:
            progress(min(part.stop, len(trace)), len(trace))
    sink.close()
