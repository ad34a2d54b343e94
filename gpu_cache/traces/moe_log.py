"""The log of routing of llama.cpp's CPU kernels in forks with an expert cache (GGML_MOE_LOG=FILE): for each token and
layer a line with the name of the tensor and the expert ids.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import MAX_EXPERTS, Trace
from gpu_cache.traces.base import Progress, Sizes, Source, TraceFormat, choices
from gpu_cache.traces.computed import trace_of_passes

_LINE = re.compile(r"blk\.(\d{1,6})\.ffn_\w*exps\S*((?:\s+-?\d{1,9})+)$")


def _fits(source: Source) -> bool:
    return bool(_LINE.match(source.line.decode("utf-8", "replace")))


def _read(source: Source, sizes: Sizes) -> Trace:
    """It does not tell sequences apart. An id of -1 is an expert that was computed elsewhere, and is left out."""
    layers, experts = array("q"), array("q")
    width = 0
    for number, line in source.lines():
        found = _LINE.match(line)
        if not found:
            raise CacheError(
                f"{source.name}: line {number} is {line[:60]!r}; allowed: blk.N.ffn_gate_exps.weight and ids"
            )
        chosen = [int(word) for word in found[2].split()]
        width = width or len(chosen)
        if len(chosen) != width or max(chosen) >= (sizes.experts or MAX_EXPERTS):
            raise CacheError(
                f"{source.name}: line {number} has {len(chosen)} experts up to {max(chosen)}; allowed: {width} as the "
                f"first line has, from 0 to {(sizes.experts or MAX_EXPERTS) - 1}"
            )
        layers.append(int(found[1]))
        experts.extend(chosen)
    table = np.frombuffer(experts, np.int64).reshape(-1, max(width, 1))
    return trace_of_passes(np.frombuffer(layers, np.int64), table, sizes, source.name)


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    file.writelines(line.encode() for line in _lines(trace, progress))


def _lines(trace: Trace, progress: Progress) -> Iterator[str]:
    for choice in choices(trace, progress):
        yield f"blk.{choice.layer}.ffn_gate_exps.weight {' '.join(map(str, choice.experts))}\n"


FORMATS = (
    TraceFormat(
        "moe-log",
        "log of routing of llama.cpp's forks with an expert cache (GGML_MOE_LOG)",
        "",
        "scores, sequences and positions",
        _fits,
        _read,
        _write,
    ),
)
