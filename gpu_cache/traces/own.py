"""This project's own traces (`gpu_cache/trace.py`): CSV and parquet with the same columns."""

from __future__ import annotations

from typing import BinaryIO

from gpu_cache.trace import COLUMNS, Trace, read_trace
from gpu_cache.trace_writer import write_trace
from gpu_cache.traces.base import Progress, Sizes, Source, TraceFormat


def _read(source: Source, sizes: Sizes) -> Trace:
    return read_trace(source.stream, source.name, sizes.layers, sizes.experts)


def _is_csv(source: Source) -> bool:
    names = {name.strip() for name in source.line.decode("utf-8", "replace").split(",")}
    return names >= set(COLUMNS)


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    write_trace(file, trace, progress=progress)


def _write_parquet(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    write_trace(file, trace, True, progress)


FORMATS = (
    TraceFormat("csv", "this project's own, as `hybrid run --trace` writes it", ".csv", "", _is_csv, _read, _write),
    TraceFormat(
        "parquet",
        "the same as parquet (needs pyarrow)",
        ".parquet",
        "",
        lambda source: set(source.columns) >= set(COLUMNS),
        _read,
        _write_parquet,
    ),
)
