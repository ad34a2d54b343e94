"""Writes a trace while an engine runs, into a file that is committed when it is whole, whatever ends the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import COLUMNS, Trace, import_parquet

_ROWS_BUFFERED = 1 << 16


class Target(Protocol):
    """An open file that is committed once it is whole, or discarded. What fails raises OSError."""

    @property
    def file(self) -> BinaryIO: ...
    def commit(self) -> None: ...
    def discard(self) -> None: ...


class Sink(Protocol):
    """Writes rows as they come. What fails raises OSError, what it cannot hold CacheError."""

    def write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class TraceWriter:
    """A context manager; leaving it, by an exception too, commits the file with every row written so far.

    When the disk fills or fails, `warn` gets one line that begins with `name`, the file is discarded and later rows are
    dropped: a run never ends because of its trace. sink: writes another format than CSV or parquet. Raises CacheError
    for parquet where it is not installed.
    """

    def __init__(
        self,
        target: Target,
        name: str,
        warn: Callable[[str], None],
        parquet: bool = False,
        sink: Callable[[BinaryIO], Sink] | None = None,
    ) -> None:
        self._target, self._name, self._warn = target, name, warn
        self._blocks: list[NDArray[np.float64]] = []
        self._scores: list[NDArray[np.float32]] = []
        self._buffered = 0
        self._sink = sink(target.file) if sink else _sink(target.file, parquet)
        self._failed = False

    def write(self, step: int, layer: int, sequence: ArrayLike, position: ArrayLike, expert: Any, score: Any) -> None:
        """Append the rows of one (step, layer). sequence, position: (tokens,); expert, score: (tokens, top_k)."""
        if self._failed:
            return
        tokens, top_k = np.shape(expert)
        block = np.empty((6, tokens, top_k), np.int64)
        block[0], block[3], block[4] = step, layer, np.arange(top_k)
        block[1], block[2] = np.reshape(sequence, (-1, 1)), np.reshape(position, (-1, 1))
        block[5] = expert
        self._blocks.append(block.reshape(6, -1))
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
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.write((",".join(COLUMNS) + "\n").encode())

    def write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None:
        """Scores are written so that reading gives the same float32."""
        cells = zip(*integers.tolist(), scores.astype(str).tolist(), strict=True)
        self._file.write("".join(map("%d,%d,%d,%d,%d,%d,%s\n".__mod__, cells)).encode())
        self._file.flush()

    def close(self) -> None:
        """Nothing follows the rows."""

    def abandon(self) -> None:
        """Nothing is held but the file."""


class _ParquetSink:
    def __init__(self, file: BinaryIO) -> None:
        parquet = import_parquet()
        import pyarrow

        fields = [(name, pyarrow.float32() if name == "score" else pyarrow.int64()) for name in COLUMNS]
        self._schema = pyarrow.schema(fields)
        self._writer = parquet.ParquetWriter(file, self._schema)

    def write(self, integers: NDArray[Any], scores: NDArray[np.float32]) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.table([*integers, scores], schema=self._schema))

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        with suppress(OSError):
            self._writer.close()


def _sink(file: BinaryIO, parquet: bool) -> Sink:
    return _ParquetSink(file) if parquet else _CsvSink(file)


def write_trace(
    file: BinaryIO, trace: Trace, parquet: bool = False, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a whole trace. progress: called with rows done and all rows. Raises CacheError for parquet where it is not
    installed, and OSError.
    """
    sink = _sink(file, parquet)
    integers = np.array([getattr(trace, name) for name in COLUMNS[:-1]])
    for first in range(0, len(trace), _ROWS_BUFFERED):
        part = slice(first, first + _ROWS_BUFFERED)
        sink.write(integers[:, part], trace.score[part])
        if progress is not None:
            progress(min(part.stop, len(trace)), len(trace))
    sink.close()
