"""Arrays of numpy: of each sequence the experts of its tokens, [tokens, MoE layers, experts of a token]."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gpu_cache.errors import CacheError
from gpu_cache.trace import Trace
from gpu_cache.traces.base import (
    MAX_VALUES,
    Progress,
    Sizes,
    Source,
    TraceFormat,
    archive_errors,
    by_sequence,
    check_width,
    finish,
    routed,
)

_LACKS = "scores, and which tokens were computed together"


def read_array(data: bytes, name: str) -> NDArray[np.integer[Any]]:
    """The array of a .npy, of whole numbers and three dimensions. name: for errors. Raises CacheError."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:
        raise CacheError(f"{name}: is no whole array ({' '.join(str(error).split())[:120]}); save it again") from None
    if dtype.kind not in "iu" or len(shape) != 3:
        raise CacheError(
            f"{name}: is an array of {dtype} and shape {shape}; allowed: whole numbers [tokens, layers, k]"
        )
    if math.prod(shape) > MAX_VALUES or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise CacheError(f"{name}: has {len(data) - file.tell()} bytes for the shape {shape}; save it again")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def trace_of_arrays(
    arrays: list[NDArray[np.integer[Any]]], sizes: Sizes, name: str, prompts: list[int] | None = None
) -> Trace:
    """A trace of sequences, one after the other. arrays: [tokens, layers, k] of each, -1 where nothing was routed.

    prompts: how many tokens of each were read in one step; None: none.
    """
    blocks, before = [], 0
    for sequence, array in enumerate(arrays):
        prompt = prompts[sequence] if prompts else 0
        position = np.arange(array.shape[0])
        step = before + np.maximum(position - max(prompt - 1, 0), 0)
        before = int(step[-1]) + 1 if len(step) else before
        token, layer, rank = np.indices(array.shape).reshape(3, -1)
        columns = {"step": step[token], "sequence": np.full(token.shape, sequence), "position": token, "layer": layer}
        score = np.full(token.shape, 1 / max(array.shape[2], 1), np.float32)
        columns |= {"rank": rank, "expert": array.reshape(-1).astype(np.int64), "score": score}
        blocks.append(routed(columns))
    if not blocks:
        raise CacheError(f"{name}: holds no sequences; give a whole file")
    return finish({key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}, sizes, name)


def _read(source: Source, sizes: Sizes) -> Trace:
    return trace_of_arrays([read_array(source.whole, source.name)], sizes, source.name)


def _read_several(source: Source, sizes: Sizes) -> Trace:
    with archive_errors(source.name, "npz"), zipfile.ZipFile(io.BytesIO(source.whole)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > 8 * MAX_VALUES:
            raise CacheError(f"{source.name}: has more than {8 * MAX_VALUES} bytes of arrays; give fewer at a time")
        arrays = [read_array(archive.read(member), f"{source.name}: {member.filename}") for member in members]
    return trace_of_arrays(arrays, sizes, source.name)


def _write(file: BinaryIO, trace: Trace, progress: Progress) -> None:
    """Written as it is; all sequences must have whole tokens."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, array in enumerate(_arrays(trace)):
            data = io.BytesIO()
            np.save(data, array, allow_pickle=False)
            archive.writestr(f"sequence_{number}.npy", data.getvalue())
    progress(len(trace), len(trace))


def _arrays(trace: Trace) -> Iterator[NDArray[np.int16]]:
    check_width(trace, "npz")
    top_k = int(trace.rank.max()) + 1
    ordered = by_sequence(trace)
    for rows in np.split(np.arange(len(ordered)), np.flatnonzero(np.diff(ordered.sequence)) + 1):
        places = np.stack([ordered.step[rows], ordered.position[rows]])  # a position may be computed again
        names, token = np.unique(places, axis=1, return_inverse=True)
        array = np.full((names.shape[1], trace.layers, top_k), -1, np.int16)
        array[token.reshape(-1), ordered.layer[rows], ordered.rank[rows]] = ordered.expert[rows]
        yield array


FORMATS = (
    TraceFormat(
        "npz",
        "arrays [tokens, layers, experts] of numpy, one a sequence",
        ".npz",
        _LACKS,
        lambda source: source.head.startswith(b"PK\x03\x04") and b".npy" in source.head[:256],
        _read_several,
        _write,
    ),
    TraceFormat(
        "npy",
        "one such array, as vLLM's routed_experts saved by numpy.save",
        "",
        _LACKS,
        lambda source: source.head.startswith(npy.MAGIC_PREFIX),
        _read,
    ),
)
