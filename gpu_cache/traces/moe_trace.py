"""The CSV of `llama-moe-trace`, a tool beside llama.cpp (MOE_TRACE_OUT), which is also a profile for
`--moe-cache-profile`: position, layer and expert ids, without a header. Rows of prompts have negative positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace, load_rows
from gpu_cache.traces.base import Progress, Sizes, Source, TraceFormat, by_sequence, check_width, choices, is_prompt
from gpu_cache.traces.computed import trace_of_passes

_LINE = re.compile(rb"-?\d+,\d+(,\d+)+\s*$")


def _fits(source: Source) -> bool:
    return bool(_LINE.match(source.line))


def _read(source: Source, sizes: Sizes) -> Trace:
    """Another sequence begins where a prompt follows a token, or where positions begin anew: traces may be joined."""
    width = source.line.count(b",") + 1
    if width < 3:  # position, layer and an expert
        raise CacheError(f"{source.name}: begins with {source.line[:60]!r}; allowed: position,layer,expert,...")
    lines = iter(source.stream.readline, b"")
    rows = load_rows(lines, source.name, np.dtype("i8")).reshape(-1, width)
    position, layer = rows[:, 0], rows[:, 1]
    prompt = position < 0
    begins = prompt[1:] & ~prompt[:-1] | ~prompt[1:] & ~prompt[:-1] & (position[1:] < position[:-1])
    return trace_of_passes(layer, rows[:, 2:], sizes, source.name, np.concatenate([[False], begins]))


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    check_width(trace, "moe-trace")
    file.writelines(line.encode() for line in _lines(by_sequence(trace), progress))


def _lines(trace: Trace, progress: Progress) -> Iterator[str]:
    """Positions count from the first token that is no prompt's."""
    prompt = is_prompt(trace)
    begins = np.flatnonzero(np.diff(trace.sequence, prepend=trace.sequence[0] - 1))
    lowest = np.minimum.reduceat(trace.position, begins)
    ends = np.maximum.reduceat(np.where(prompt, trace.position, -1), begins) + 1
    first = dict(zip(trace.sequence[begins].tolist(), np.where(ends > 0, ends, lowest).tolist(), strict=True))
    for choice in choices(trace, progress):
        position = choice.position - first[choice.sequence]
        yield ",".join(map(str, (position, choice.layer, *choice.experts))) + "\n"


FORMATS = (
    TraceFormat(
        "moe-trace",
        "CSV of llama-moe-trace beside llama.cpp (MOE_TRACE_OUT)",
        "",
        "scores, and which tokens of several sequences were computed together",
        _fits,
        _read,
        _write,
    ),
)
