"""One safetensors file: its header read and checked, or made so that every tensor is aligned."""

from __future__ import annotations

import json
import math
import reprlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hybrid.errors import WeightsError
from hybrid.files import Reading, input_file

ALIGNMENT = 64  # bytes: a cache line and the widest vector register
PADDING = "__pad_"  # tensors of this name fill the gaps, because safetensors allows none

SHARD = Reading(1 << 62, "fetch or make the file again", streams=False, error=WeightsError)
_LENGTH_BYTES = 8
_READ_BYTES = 1 << 20
_MAX_HEADER = 100_000_000  # that of the format; keeps a damaged length from reading gigabytes
_MAX_SIZE, _MAX_RANK = 1 << 60, 16  # of tensors; far above what exists, far below what cannot be printed
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of the file `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. Raises `WeightsError` on anything that is not sound."""
    with input_file(path, SHARD) as file:
        size = path.stat().st_size
        data_start, header = _read_header_object(path, file, size)
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    entries = {name: _entry(path, name, value, data_start, size) for name, value in tensors.items()}
    _check_overlaps(path, entries)
    return entries


def header_end(prefix: bytes, size: int) -> int:
    """Where the header of a file of `size` bytes ends that begins with these 8 bytes, sound or not."""
    return min(len(prefix) + int.from_bytes(prefix, "little"), size, _MAX_HEADER)


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Header of a file of (name, dtype, shape, bytes) tensors, each to be followed by `gap(bytes)` zeros.

    Its length is a multiple of the alignment, so that the data starts on one and so does every tensor.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
        if padding := gap(nbytes):
            end = offset + padding
            header[f"{PADDING}{offset}"] = {"dtype": "U8", "shape": [padding], "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * gap(_LENGTH_BYTES + len(text))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def gap(nbytes: int) -> int:
    """Bytes from the end of `nbytes` to the next multiple of the alignment."""
    return -nbytes % ALIGNMENT


def read_bytes(entry: Entry, start: int, end: int) -> npt.NDArray[np.uint8]:
    """Bytes `start` to `end` of a tensor; not by mapping the file, which would count as resident memory."""
    data = np.empty(end - start, np.uint8)
    view = data.data
    try:
        with open(entry.path, "rb", buffering=0) as file:
            file.seek(entry.start + start)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise _damaged(entry.path, "ended while it was read")
                view = view[count:]
    except OSError as error:
        raise _damaged(entry.path, f"cannot be read ({error.strerror})") from None
    return data


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors are the same in type, shape and every byte; reads no further than the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = one.end - one.start
    spans = ((start, min(start + _READ_BYTES, size)) for start in range(0, size, _READ_BYTES))
    return all(np.array_equal(read_bytes(one, *span), read_bytes(other, *span)) for span in spans)


def checksum(entry: Entry) -> int:
    """crc32 of a tensor's bytes."""
    crc, size = 0, entry.end - entry.start
    for start in range(0, size, _READ_BYTES):
        crc = zlib.crc32(read_bytes(entry, start, min(start + _READ_BYTES, size)).data, crc)
    return crc


def _read_header_object(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        raise _damaged(path, f"is truncated: {size} bytes, too short for a safetensors header")
    length = int.from_bytes(prefix, "little")
    if _LENGTH_BYTES + length > size:
        raise _damaged(path, f"has a header longer than the file: {length} bytes of {size}")
    if length > _MAX_HEADER:
        raise _damaged(path, f"has a header of {length} bytes, at most {_MAX_HEADER} are allowed")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise _damaged(path, "has a header that is not JSON; it must be a safetensors file") from None
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is not a JSON object; it must be a safetensors file")
    return _LENGTH_BYTES + length, header


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> Entry:
    if not _well_formed(value):
        raise _damaged(path, f"has a malformed header entry for tensor {name:.200}")
    (start, end), shape, dtype = value["data_offsets"], tuple(value["shape"]), value["dtype"]
    if data_start + end > size:
        raise _damaged(path, f"is truncated: tensor {name:.200} ends at byte {data_start + end}, the file has {size}")
    expected = math.prod(shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and end - start != expected:
        found = f"{name:.200} {end - start} bytes, {dtype} {reprlib.repr(list(shape))}"
        raise _damaged(path, f"gives tensor {found} takes {expected}")
    return Entry(path, dtype, shape, data_start + start, data_start + end)


def _well_formed(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("dtype"), str):
        return False
    offsets, shape = value.get("data_offsets"), value.get("shape")
    if not isinstance(offsets, list) or not isinstance(shape, list) or len(offsets) != 2:
        return False
    sizes = all(type(n) is int and 0 <= n < _MAX_SIZE for n in [*offsets, *shape])
    return sizes and offsets[0] <= offsets[1] and len(shape) <= _MAX_RANK


def _check_overlaps(path: Path, entries: Mapping[str, Entry]) -> None:
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    for (before, first), (after, second) in zip(ordered, ordered[1:], strict=False):
        if second.start < first.end:
            raise _damaged(path, f"has overlapping tensors {before:.200} and {after:.200}")


def _damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}; fetch or make the file again")
