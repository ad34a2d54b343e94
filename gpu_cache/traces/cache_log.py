"""The log of llama.cpp with `--moe-cache-mib`, which counts hits and names no experts: known, and refused."""

from __future__ import annotations

import re

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace
from gpu_cache.traces.base import Sizes, Source, TraceFormat

_SIGN = re.compile(rb"\b(?:llama_moe_cache|moe_cache)\b[^\n]*:")
_COUNTS = re.compile(r"hits = (\d{1,18}), misses = (\d{1,18})")


def _fits(source: Source) -> bool:
    return bool(_SIGN.search(source.head))


def _read(source: Source, sizes: Sizes) -> Trace:
    counts = [tuple(map(int, found)) for _, line in source.lines() for found in _COUNTS.findall(line)]
    hits, misses = counts[-1] if counts else (0, 0)
    last = f", {hits} hits of {hits + misses} in the last line," if counts else ""
    raise CacheError(
        f"{source.name}: is a log of llama.cpp's expert cache, which counts hits{last} and names no experts, so that "
        "nothing can be replayed; record with llama-moe-trace (MOE_TRACE_OUT=FILE) or GGML_MOE_LOG=FILE"
    )


FORMATS = (
    TraceFormat(
        "cache-log",
        "log of llama.cpp --moe-cache-mib: known and refused, as it counts hits and names no experts",
        "",
        "experts",
        _fits,
        _read,
    ),
)
