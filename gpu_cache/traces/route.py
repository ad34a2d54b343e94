"""`route.csv` of BigMoeOnEdge (`--route-trace`): facts of the model in comments, then a row for each expert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace, load_rows
from gpu_cache.traces.base import (
    Progress,
    Sizes,
    Source,
    TraceFormat,
    by_sequence,
    finish,
    is_prompt,
    parts,
    passes_of,
)

_ROW = np.dtype([(name, "i8") for name in ("turn", "step", "layer", "slot", "expert")] + [("weight", "f4")])
_HEADER = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes", "dropped")
_EXPERTS = re.compile(rb"\bn_expert=(\d{1,9})\b")


def _fits(source: Source) -> bool:
    return source.line.startswith((b"# route_trace", ",".join(_HEADER[:7]).encode()))


def _read(source: Source, sizes: Sizes) -> Trace:
    """Its `step` is the position of a token in the context of a turn, and `slot` the rank. Rows come pass by pass and
    layer by layer. What its cache did with a routing (residency, bytes, dropped) is left out.
    """
    experts, header = None, b""
    lines = iter(source.stream.readline, b"")
    for header in lines:
        if found := _EXPERTS.search(header):
            experts = int(found[1])
        if header.strip() and not header.startswith(b"#"):
            break
    names = [name.strip() for name in header.decode("utf-8-sig", "replace").split(",")]
    missing = [name for name in _ROW.names or () if name not in names]
    if missing:
        raise CacheError(f"{source.name}: has no column {', '.join(missing)}; a route.csv has {','.join(_HEADER)}")
    rows = load_rows(lines, source.name, _ROW, [names.index(name) for name in _ROW.names or ()])
    if not len(rows):
        raise CacheError(f"{source.name}: holds no rows; record at least one token")
    score = rows["weight"].copy()
    score[np.isnan(score)] = 1 / (int(rows["slot"].max()) + 1)  # where its graph had none
    columns = {"step": passes_of(rows["layer"], rows["turn"]), "sequence": rows["turn"], "position": rows["step"]}
    columns |= {"layer": rows["layer"], "rank": rows["slot"], "expert": rows["expert"], "score": score}
    return finish(columns, sizes, source.name, experts)


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    file.writelines(line.encode() for line in chain(_preamble(trace), _lines(by_sequence(trace), progress)))


def _preamble(trace: Trace) -> Iterator[str]:
    top_k = int(trace.rank.max()) + 1
    yield "# route_trace v1\n"
    yield f"# model=unknown arch=unknown n_layer={trace.layers} n_expert={trace.experts} n_expert_used={top_k}\n"
    yield ",".join(_HEADER) + "\n"


def _lines(trace: Trace, progress: Progress) -> Iterator[str]:
    phase = (~is_prompt(trace)).astype(np.int64)
    for part in parts(trace, progress):
        columns = (trace.sequence, phase, trace.position, trace.layer, trace.rank, trace.expert, trace.score)
        cells = zip(*(column[part].tolist() for column in columns), strict=True)
        yield from map("%d,%d,%d,%d,%d,%d,%.6g,0,0,0\n".__mod__, cells)


FORMATS = (
    TraceFormat(
        "route",
        "route.csv of BigMoeOnEdge (--route-trace)",
        "",
        "digits of scores beyond six, steps that several sequences share, and what its cache did",
        _fits,
        _read,
        _write,
    ),
)
