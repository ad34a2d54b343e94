"""Traces in files that users name. What their bytes mean is in `gpu_cache`, which opens no files."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from hybrid.errors import ConfigError, cache_errors
from hybrid.files import FileKind, Reading, check_output, csv_kind, input_file, is_stream, open_output, output_file

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from gpu_cache.trace import Trace
    from gpu_cache.trace_writer import TraceWriter
    from gpu_cache.traces.base import TraceFormat

CHOICES_NAME = "expert_choices.csv"  # written in the columns of the collaborative inference of arXiv 2512.16473
SUFFIXES = (".csv", ".parquet")
TRACES = Reading(8 << 30, "give a trace, as `hybrid run` records it or as `hybrid trace formats` lists them")

Progress = Callable[[int, int], None]


def is_trace(path: Path) -> bool:
    """Whether a regular file is a trace of a known format. Raises ConfigError for one that cannot be read."""
    from gpu_cache.traces import find_format
    from gpu_cache.traces.base import Source

    if not path.is_file():
        return False
    with input_file(path, TRACES) as file:
        return find_format(Source(file, str(path))) is not None


@dataclass(frozen=True)
class Opened:
    """A trace, and the format of its file."""

    trace: Trace
    format: TraceFormat


def read_trace(path: Path, layers: int | None = None, experts: int | None = None, flag: str = "") -> Trace:
    """Read a trace of any known format (`gpu_cache/traces/`); which it is, its content says.

    layers, experts: of the model; None: what occurs. flag: that named the file. Raises CacheError for what is in the
    file, ConfigError for a file that cannot be read.
    """
    return open_trace_file(path, layers, experts, flag).trace


def open_trace_file(
    path: Path,
    layers: int | None = None,
    experts: int | None = None,
    flag: str = "",
    wanted: TraceFormat | None = None,
    progress: Progress | None = None,
) -> Opened:
    """The same, and the format. wanted: the format; None: as the content says. progress: called with the bytes that
    were read and those there are, of a regular file.
    """
    from gpu_cache.traces import format_of, read_source
    from gpu_cache.traces.base import Sizes, Source

    with input_file(path, replace(TRACES, prefix=flag)) as file:
        size = path.stat().st_size if progress and path.is_file() else 0
        watched: BinaryIO = io.BufferedReader(_Watched(file, size, progress), 1 << 20) if progress and size else file
        source = Source(watched, str(path))
        known = wanted or format_of(source)
        return Opened(read_source(source, Sizes(layers, experts), known), known)


class _Watched(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, size: int, progress: Progress) -> None:
        self._file, self._size, self._progress = file, size, progress
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._done += count
        self._progress(self._done, self._size)
        return count


def write_trace(
    path: Path, trace: Trace, wanted: TraceFormat | None = None, progress: Progress = lambda done, total: None
) -> None:
    """Write a whole trace. wanted: its format; None: as the suffix says. Raises ConfigError, CapacityError, and
    CacheError for what the format cannot hold.
    """
    known = wanted or format_by_suffix(path)
    if known.write is None:
        raise ConfigError(f"{path}: {known.name} is only read; choose another format")
    with output_file(path, kind_of_format(known)) as file:
        known.write(file, trace, progress)


def format_by_suffix(path: Path) -> TraceFormat:
    """The format that a name stands for; our own CSV for a pipe. Raises ConfigError for a name that says none."""
    from gpu_cache.traces import FORMATS, known_format

    by_suffix = {known.suffix.lower(): known for known in FORMATS if known.suffix and known.write}
    if path.name == CHOICES_NAME:
        return known_format("expert-choices")
    if is_stream(path):
        return known_format("csv")
    if path.suffix.lower() not in by_suffix:
        raise ConfigError(f"{path}: no format of traces ends so; say it by --to, or end in {', '.join(by_suffix)}")
    return by_suffix[path.suffix.lower()]


def kind_of_format(known: TraceFormat) -> FileKind:
    """What may be replaced by a trace of this format: another one of it."""
    from gpu_cache.traces.base import Source

    if known.name == "csv" or known.name.endswith("parquet"):  # whose columns stand at its end
        return _own_kind(known.name != "csv")
    return FileKind(f"a trace of the format {known.name}", lambda head: known.fits(Source(io.BytesIO(head), "")))


def open_trace(path: Path, warn: Callable[[str], None], next_expert: bool = False) -> TraceWriter:
    """A writer of a trace that grows as an engine runs. next_expert: with what routers say one layer early.

    Raises ConfigError for a place that cannot be written.
    """
    from gpu_cache.trace_writer import TraceWriter
    from gpu_cache.traces.expert_choices import ChoicesSink

    sink = ChoicesSink if path.name == CHOICES_NAME else None
    with cache_errors():
        return TraceWriter(open_output(path, trace_kind(path)), str(path), warn, _is_parquet(path), sink, next_expert)


def check_trace_output(flag: str, path: Path | None) -> None:
    """Raise ConfigError unless a trace can be written there."""
    if path is None:
        return
    if path.suffix not in SUFFIXES and not path.is_dir() and not is_stream(path):
        raise ConfigError(f"{flag} {path}: a trace ends in {' or '.join(SUFFIXES)}; name it so")
    check_output(flag, path, trace_kind(path))
    if _is_parquet(path):
        from gpu_cache.trace import import_parquet

        with cache_errors(flag):
            import_parquet()


def trace_kind(path: Path) -> FileKind:
    """What may be replaced by a trace of this name."""
    if path.name == CHOICES_NAME:
        return kind_of_format(format_by_suffix(path))
    return _own_kind(_is_parquet(path))


def _own_kind(parquet: bool) -> FileKind:
    from gpu_cache.trace import COLUMNS

    return FileKind("a parquet file", lambda head: head.startswith(b"PAR1")) if parquet else csv_kind(COLUMNS)


def _is_parquet(path: Path) -> bool:
    """A pipe or a device without a suffix gets CSV."""
    return path.suffix == ".parquet"
