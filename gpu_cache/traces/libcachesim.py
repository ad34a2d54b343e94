"""Traces for caches in general, as libCacheSim reads them: CSV, and its binary oracleGeneral with next accesses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from gpu_cache.errors import CacheError
from gpu_cache.trace import Calls, Ints, Trace, calls, load_rows
from gpu_cache.traces.base import Progress, Sizes, Source, TraceFormat, finish

COLUMNS = ("time", "object", "size")
_ROW = np.dtype([(name, "i8") for name in COLUMNS])
_RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
_SEEN = 64  # records that are looked at to know the format, which has no sign
_LARGEST = 1 << 40  # key that is read
_PART = 1 << 16
_LACKS = "tokens, sequences, scores, and experts that a step calls more than once; read it with --experts N"


def _is_csv(source: Source) -> bool:
    names = [name.strip() for name in source.line.lstrip(b"#").decode("utf-8", "replace").split(",")]
    return tuple(names[: len(COLUMNS)]) == COLUMNS


def _read_csv(source: Source, sizes: Sizes) -> Trace:
    stream = source.stream
    stream.readline()
    rows = load_rows(iter(stream.readline, b""), source.name, _ROW, range(len(COLUMNS)))
    return _trace(rows["time"], rows["object"], source, sizes)


def _write_csv(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    """Time is the number of the group of calls, object the key, layer * experts + expert, and size 1: read it there
    with `time-col=1, obj-id-col=2, obj-size-col=3, has-header=true, delimiter=,`. It has no sets and no groups: such a
    replay equals ours for a fully associative cache and one call a group alone.
    """
    grouped = calls(trace)
    file.write((",".join(COLUMNS) + "\n").encode())
    for time, key in _parts(grouped, progress):
        file.write("".join(map("%d,%d,1\n".__mod__, zip(time.tolist(), key.tolist(), strict=True))).encode())


def _is_oracle(source: Source) -> bool:
    """Ascending times, keys and sizes as ours, and next accesses that lie ahead, or are -1 for none."""
    whole = len(source.head) // _RECORD.itemsize * _RECORD.itemsize
    records = np.frombuffer(source.head[:whole], _RECORD)[:_SEEN]
    if not len(records) or whole < len(source.head) < _SEEN * _RECORD.itemsize:
        return False
    ahead = (records["next"] == -1) | (records["next"] > np.arange(len(records)))
    keys = records["object"] < _LARGEST
    return bool(
        (np.diff(records["time"].astype(np.int64)) >= 0).all() and (ahead & keys).all() and records["size"].all()
    )


def _read_oracle(source: Source, sizes: Sizes) -> Trace:
    if len(source.whole) % _RECORD.itemsize:
        raise CacheError(
            f"{source.name}: has {len(source.whole)} bytes, no multiple of {_RECORD.itemsize}; copy it again"
        )
    records = np.frombuffer(source.whole, _RECORD)
    key = records["object"]
    if len(key) and int(key.max()) >= _LARGEST:
        raise CacheError(f"{source.name}: has the object {int(key.max())}, which is no layer * experts + expert")
    return _trace(records["time"].astype(np.int64), key.astype(np.int64), source, sizes)


def _write_oracle(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    grouped = calls(trace)
    ahead, done = _next_access(grouped.key), 0
    for time, key in _parts(grouped, progress):
        records = np.empty(len(key), _RECORD)
        records["time"], records["object"], records["size"] = time, key, 1
        records["next"] = ahead[done : done + len(key)]
        file.write(records.tobytes())
        done += len(key)


def _next_access(key: Ints) -> Ints:
    """For each call the number of the next one of the same key, counted from 1 as its readers do; -1: there is none."""
    order = np.argsort(key, kind="stable")
    ahead = np.full(len(key), -1, np.int64)
    same = key[order[1:]] == key[order[:-1]]
    ahead[order[:-1][same]] = order[1:][same] + 1
    return ahead


def _parts(grouped: Calls, progress: Progress) -> Iterator[tuple[Ints, Ints]]:
    """Number of the group, and key, of a bounded number of calls."""
    group = np.repeat(np.arange(len(grouped)), grouped.sizes)
    for first in range(0, grouped.total, _PART):
        part = slice(first, min(first + _PART, grouped.total))
        yield group[part], grouped.key[part]
        progress(part.stop, grouped.total)


def _trace(time: Ints, key: Ints, source: Source, sizes: Sizes) -> Trace:
    """Keys are layer * experts + expert. Calls of a time are a group, and a layer that is not behind the last begins a
    step.
    """
    if sizes.experts is None:
        raise CacheError(
            f"{source.name}: has objects, no layers and experts; say how many experts a layer has: --experts N"
        )
    if not len(key) or int(key.min()) < 0:
        raise CacheError(
            f"{source.name}: holds {'no calls' if not len(key) else 'objects below 0'}; give a trace of keys"
        )
    layer, expert = np.divmod(key, sizes.experts)
    begins = np.flatnonzero((np.diff(time, prepend=time[0] - 1) != 0) | (np.diff(layer, prepend=-1) != 0))
    size = np.diff(np.append(begins, len(key)))
    of_group = layer[begins]
    step = np.repeat(np.cumsum(np.diff(of_group, prepend=of_group[0]) <= 0) - 1, size)
    rank = np.arange(len(key)) - np.repeat(begins, size)
    columns = {"step": step, "sequence": np.zeros_like(step), "position": step, "layer": layer, "rank": rank}
    score = np.repeat(1 / size, size).astype(np.float32)
    return finish({**columns, "expert": expert, "score": score}, sizes, source.name)


FORMATS = (
    TraceFormat("libcachesim", "CSV for libCacheSim: time, object, size", "", _LACKS, _is_csv, _read_csv, _write_csv),
    TraceFormat(
        "oracle-general",
        "oracleGeneral, libCacheSim's binary with next accesses",
        ".oracleGeneral",
        _LACKS,
        _is_oracle,
        _read_oracle,
        _write_oracle,
    ),
)
