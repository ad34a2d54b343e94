"""The header of a GGUF file: what it says of itself, and where its tensors lie. Everything is checked."""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hybrid.errors import WeightsError
from hybrid.files.gguf_types import TYPES
from hybrid.files.places import is_file
from hybrid.files.reading import Reading, input_descriptor

SUFFIX = ".gguf"
GGUF = Reading(1 << 62, "fetch or make the file again", streams=False, error=WeightsError)

_MAGIC, _VERSIONS = b"GGUF", (1, 2, 3)
_ALIGNMENT, _DEFAULT_ALIGNMENT, _LARGEST_ALIGNMENT = "general.alignment", 32, 1 << 16
_LARGEST_HEADER = 1 << 28  # bytes; published ones have up to 20 MB, most of it a vocabulary
_FIRST_READ = 1 << 20
_LONGEST_NAME, _LARGEST_RANK, _LARGEST_SIZE = 256, 4, 1 << 48
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: bytes `start` to `end` of a file. shape: rows before columns, unlike in the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file. end: where it ends, in bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    end: int


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, by its name or its first bytes."""
    if not is_file(path):
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    if not path.is_file():  # to open a pipe would wait for its writer
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path, whole: bool = True) -> GgufHeader:
    """Read and check the header of a file. Raises WeightsError on anything that is not sound.

    whole: whether the file must hold its tensors, too, and not only say where they would be.
    """
    with input_descriptor(path, GGUF) as opened:
        status = os.fstat(opened)
    return _read(path, status.st_size, status.st_mtime_ns, status.st_ino, whole)


@lru_cache(maxsize=8)  # a start reads it several times, and a vocabulary takes a while
def _read(path: Path, size: int, time: int, inode: int, whole: bool) -> GgufHeader:
    with input_descriptor(path, GGUF) as opened:
        cursor = _Cursor(path, opened, size)
        count, entries = _read_counts(cursor)
        metadata = _read_metadata(cursor, entries)
        tensors = _read_tensors(cursor, count, _alignment(path, metadata))
        _check_places(path, tensors, size if whole else None)
        return GgufHeader(path, metadata, tensors, cursor.position)


class _Cursor:
    """Reads from the start of a file, some of it at a time, and never beyond its end."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.size = path, size
        self.position = 0
        self.length = "<Q"  # of counts and of texts, 4 bytes in version 1
        self._descriptor, self._data = descriptor, b""

    def take(self, count: int, what: str) -> int:
        """Skip `count` bytes, which are then in memory; returns where they start."""
        start, end = self.position, self.position + count
        if end > len(self._data):
            self._extend(end, what)
        self.position = end
        return start

    def magic(self) -> bytes:
        start = self.take(len(_MAGIC), "its magic")
        return self._data[start : start + len(_MAGIC)]

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def count(self, what: str, least: int) -> int:
        """How many of something follow, that take at least so many bytes each."""
        found: int = self.number(self.length[1:], what)
        if found * least > self.size - self.position:
            raise damaged(self.path, f"gives {found} as the number of {what}, more than the file has bytes for")
        return found

    def text(self, what: str) -> str:
        size = self.count(f"bytes of {what}", 1)
        start = self.take(size, what)
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError:
            raise damaged(self.path, f"has {what} that is not UTF-8") from None

    def texts(self, count: int, what: str) -> list[str]:
        """Vocabularies may break a character in two, so what is not UTF-8 is kept as surrogates."""
        unpack, size, found = struct.Struct(self.length).unpack_from, struct.calcsize(self.length), []
        for _ in range(count):
            start = self.take(size, what)  # which may replace the data
            length = unpack(self._data, start)[0]
            start = self.take(length, what)
            found.append(self._data[start : start + length].decode(errors="surrogateescape"))
        return found

    def numbers(self, code: str, count: int, what: str) -> list[Any]:
        start = self.take(struct.calcsize(f"<{code}") * count, what)
        return list(struct.unpack_from(f"<{count}{code}", self._data, start))

    def _extend(self, end: int, what: str) -> None:
        if end > self.size:
            raise damaged(self.path, f"is truncated: {what} ends at byte {end}, the file has {self.size}")
        if end > _LARGEST_HEADER:
            raise damaged(self.path, f"has a header of more than {_LARGEST_HEADER} bytes, which are the most allowed")
        wanted = min(self.size, _LARGEST_HEADER, max(end, 2 * len(self._data), _FIRST_READ))
        self._data += os.pread(self._descriptor, wanted - len(self._data), len(self._data))
        if end > len(self._data):
            raise damaged(self.path, "ended while it was read")


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    if cursor.size < 8 or (magic := cursor.magic()) != _MAGIC:
        found = f"begins with {magic!r}" if cursor.size >= 8 else f"has {cursor.size} bytes"
        raise damaged(cursor.path, f"is no GGUF file: it {found}, not with {_MAGIC!r} and a version")
    version = cursor.number("I", "its version")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise WeightsError(
                f"{cursor.path}: is a big-endian GGUF file, only little-endian ones are read; take a copy that was "
                "made for this kind of machine"
            )
        raise WeightsError(
            f"{cursor.path}: has GGUF version {version}, this program reads {', '.join(map(str, _VERSIONS))}; "
            "take another copy of the model"
        )
    cursor.length = "<I" if version == 1 else "<Q"
    return cursor.count("tensors", 12), cursor.count("metadata entries", 9)


def _read_metadata(cursor: _Cursor, entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = _name(cursor, "the name of a metadata entry")
        if key in metadata:
            raise damaged(cursor.path, f"has metadata {key:.100} twice")
        metadata[key] = _value(cursor, cursor.number("I", key), key)
    return metadata


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    return _checked(cursor, _scalars(cursor, kind, 1, key), key)[0]


def _array(cursor: _Cursor, key: str) -> list[Any]:
    kind = cursor.number("I", key)
    if kind == _STRING:
        return cursor.texts(cursor.count(f"texts of {key:.100}", struct.calcsize(cursor.length)), key)
    size = struct.calcsize(_SCALARS.get(kind, "B"))
    return _checked(cursor, _scalars(cursor, kind, cursor.count(f"values of {key:.100}", size), key), key)


def _scalars(cursor: _Cursor, kind: int, count: int, key: str) -> list[Any]:
    if kind not in _SCALARS:
        raise damaged(cursor.path, f"has metadata {key:.100} of type {kind}, which does not exist in this place")
    return cursor.numbers(_SCALARS[kind], count, key)


def _checked(cursor: _Cursor, values: list[Any], key: str) -> list[Any]:
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise damaged(cursor.path, f"has metadata {key:.100} that is NaN or infinite")
    return values


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    found = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
    if type(found) is not int or not 0 < found <= _LARGEST_ALIGNMENT or found & (found - 1):
        allowed = f"a power of two up to {_LARGEST_ALIGNMENT}"
        raise damaged(path, f"has {_ALIGNMENT} {reprlib.repr(found)}, it must be {allowed}")
    return found


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """Offsets are from where the data begins, which only the end of the header says."""
    found: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = _name(cursor, "the name of a tensor")
        if name in found:
            raise damaged(cursor.path, f"has tensor {name:.100} twice")
        found[name] = _read_tensor(cursor, name, alignment)
    data = -(-cursor.position // alignment) * alignment
    return {name: GgufTensor(t.type, t.shape, data + t.start, data + t.end) for name, t in found.items()}


def _read_tensor(cursor: _Cursor, name: str, alignment: int) -> GgufTensor:
    path = cursor.path
    rank = cursor.number("I", name)
    if rank > _LARGEST_RANK:
        raise damaged(path, f"gives tensor {name:.100} {rank} dimensions, at most {_LARGEST_RANK} are allowed")
    sizes = cursor.numbers(cursor.length[1:], rank, name)
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in TYPES:
        raise WeightsError(
            f"{path}: tensor {name:.100} has type {kind}, which this program does not know; "
            "take another quantisation of the model"
        )
    if not all(0 < size < _LARGEST_SIZE for size in sizes) or math.prod(sizes) >= _LARGEST_SIZE:
        raise damaged(path, f"gives tensor {name:.100} the sizes {sizes}")
    found = TYPES[kind]
    if (sizes[0] if sizes else 1) % found.block:
        raise damaged(path, f"gives {found.name} tensor {name:.100} rows of {sizes[0]} values, not of whole blocks")
    if offset % alignment:
        raise damaged(path, f"places tensor {name:.100} at {offset}, which is no multiple of {alignment}")
    nbytes = math.prod(sizes) // found.block * found.bytes
    return GgufTensor(found.name, tuple(reversed(sizes)), offset, offset + nbytes)


def _check_places(path: Path, tensors: Mapping[str, GgufTensor], size: int | None) -> None:
    """size: of the file, None where the tensors need not be there."""
    before, end = "", 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if size is not None and tensor.end > size:
            place = f"tensor {name:.100} ends at byte {tensor.end}, the file has {size}"
            raise damaged(path, f"is truncated: {place}")
        if tensor.start < end:
            raise damaged(path, f"has overlapping tensors {before:.100} and {name:.100}")
        before, end = name, tensor.end


def _name(cursor: _Cursor, what: str) -> str:
    name = cursor.text(what)
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise damaged(cursor.path, f"has {name!r:.100} as {what}; it must be of 1 to {_LONGEST_NAME} characters")
    return name


def damaged(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}; {GGUF.advice}")
