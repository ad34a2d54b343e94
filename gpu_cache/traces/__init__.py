"""Traces in the files of others: every format, told by its content, read, and written where it can hold a trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import COLUMNS, NEXT_EXPERT, Trace, make_trace
from gpu_cache.traces import (
    arrays,
    cache_log,
    expert_choices,
    fingerprints,
    libcachesim,
    moe_log,
    moe_trace,
    own,
    policylang,
    responses,
    route,
    sglang,
)
from gpu_cache.traces.base import Sizes, Source, TraceFormat

_MODULES = (own, expert_choices, route, moe_trace, moe_log, policylang, sglang, arrays, fingerprints, responses)
FORMATS: tuple[TraceFormat, ...] = tuple(
    known for module in (*_MODULES, libcachesim, cache_log) for known in module.FORMATS
)  # oracle-general, which has no sign, is looked for late


_CONTROL = re.compile(rb"[\0-\x08]")  # in no text


def known_format(name: str) -> TraceFormat:
    """By its name. Raises CacheError for one that there is not."""
    for known in FORMATS:
        if known.name == name.lower():
            return known
    raise CacheError(f"there is no format {name!r} of traces; allowed: {', '.join(known.name for known in FORMATS)}")


def find_format(source: Source) -> TraceFormat | None:
    """The format of a file, by its content; None: it is of no known one."""
    return next((known for known in FORMATS if known.fits(source)), None)


def format_of(source: Source) -> TraceFormat:
    """The format of a file; of a text or parquet that is of no known one, our own, whose reader says what it lacks.

    Raises CacheError for anything else.
    """
    if found := find_format(source):
        return found
    if source.head.startswith(b"PAR1"):
        return known_format("parquet")
    if not source.is_json and not _CONTROL.search(source.head):
        return known_format("csv")
    raise CacheError(f"{source.name}: is no trace of a known format; `hybrid trace formats` lists them")


def read(file: BinaryIO, name: str, sizes: Sizes = Sizes(), wanted: TraceFormat | None = None) -> Trace:  # noqa: B008
    """Read a trace. file: read once, so that it may be a pipe. name: for errors. wanted: its format; None: as its
    content tells. Raises CacheError.
    """
    source = Source(file, name)
    return read_source(source, sizes, wanted or format_of(source))


def read_source(source: Source, sizes: Sizes, known: TraceFormat) -> Trace:
    """The same of a file whose head was looked at."""
    if known.read is None:
        raise CacheError(f"{source.name}: {known.name} is only written; give a trace of another format")
    return known.read(source, sizes)


def joined(traces: Sequence[Trace], names: Sequence[str]) -> Trace:
    """Traces of one model, one after the other, as one: sequences and steps are numbered on.

    Raises CacheError for traces that differ in layers; experts are those of the trace with most.
    """
    if len({trace.layers for trace in traces}) > 1:
        said = ", ".join(f"{name} {trace.layers}" for name, trace in zip(names, traces, strict=True))
        raise CacheError(f"the traces are not of one model: they have as many MoE layers: {said}")
    columns = {name: [getattr(trace, name) for trace in traces] for name in COLUMNS}
    step = sequence = 0
    for at, trace in enumerate(traces):
        columns["step"][at] = trace.step - trace.step.min() + step
        columns["sequence"][at] = trace.sequence - trace.sequence.min() + sequence
        step, sequence = int(columns["step"][at][-1]) + 1, int(columns["sequence"][at].max()) + 1
    if any(trace.next_expert is not None for trace in traces):
        columns[NEXT_EXPERT] = [
            np.full(len(trace), -1) if trace.next_expert is None else trace.next_expert for trace in traces
        ]
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return make_trace(whole, traces[0].layers, max(trace.experts for trace in traces))
