"""Traces in files that users name. What their rows mean is in `gpu_cache`, which opens no files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import ConfigError, cache_errors
from hybrid.files import FileKind, Reading, check_output, csv_kind, input_file, is_stream, open_output, output_file

if TYPE_CHECKING:
    from gpu_cache.trace import Trace
    from gpu_cache.trace_writer import TraceWriter

SUFFIXES = (".csv", ".parquet")
TRACES = Reading(8 << 30, "give a trace that `hybrid run` recorded")


def read_trace(path: Path, layers: int | None = None, experts: int | None = None, flag: str = "") -> Trace:
    """Read a trace, CSV or parquet, or the seed's list of expert choices; which it is, its first bytes say.

    layers, experts: of the model; None: what occurs. flag: that named the file. Raises CacheError for what is in the
    file, ConfigError for a file that cannot be read.
    """
    from gpu_cache import converters, trace

    with input_file(path, replace(TRACES, prefix=flag)) as file:
        choices = file.peek(len(converters.CHOICES_BEGIN)).removeprefix(b"\xef\xbb\xbf").lstrip()
        if choices.startswith(converters.CHOICES_BEGIN):
            return converters.from_expert_choices(file, str(path), layers, experts)
        return trace.read_trace(file, str(path), layers, experts)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a whole trace, as its suffix says. Raises ConfigError and CapacityError."""
    from gpu_cache import trace_writer

    with output_file(path, trace_kind(path)) as file:
        trace_writer.write_trace(file, trace, _is_parquet(path))


def open_trace(path: Path, warn: Callable[[str], None]) -> TraceWriter:
    """A writer of a trace that grows as an engine runs. Raises ConfigError for a place that cannot be written."""
    from gpu_cache.trace_writer import TraceWriter

    with cache_errors():
        return TraceWriter(open_output(path, trace_kind(path)), str(path), warn, _is_parquet(path))


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
    from gpu_cache.trace import COLUMNS

    return FileKind("a parquet file", lambda head: head.startswith(b"PAR1")) if _is_parquet(path) else csv_kind(COLUMNS)


def _is_parquet(path: Path) -> bool:
    """A pipe or a device without a suffix gets CSV."""
    return path.suffix == ".parquet"
