"""Matrices that are published as 4-bit codes, eight in a word of 32 bits, with scales for groups of inputs."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn

import numpy as np

from hybrid.errors import ConfigError, WeightsError
from hybrid.formats import INT4, Q4_0, Q5_0
from hybrid.formats.block import BLOCK, GROUP, Array, Bytes, Floats
from hybrid.formats.grouped import exact_halves
from hybrid.models.reading import Fields
from hybrid.weights.checkpoints.matrices import FLOATS, Source
from hybrid.weights.checkpoints.schemes.base import MatrixEntry
from hybrid.weights.shard import Entry, read_bytes

IN_ORDER = tuple(range(8))  # which of eight neighbours the i-th four bits of a word are
MIDDLE = 8  # the zero of symmetric codes
_WORD, _HALVES = "I32", ("BF16", "F16")
_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


@dataclass(frozen=True)
class CodesScheme:
    """How the matrices of a checkpoint are published.

    codes, scales, zeros: what the names of their tensors end with; without zeros they are all 8. others: tensors that
    may be there. group: inputs that share a scale, None: all. symmetric: whether zeros are all 8. transposed: whether
    tensors lie [inputs, outputs]. axis: along which of the two the codes of a word lie. order: of these, and of zeros.
    zeros_less: how much less than they are zeros are stored.
    """

    codes: str
    scales: str
    zeros: str | None
    others: tuple[str, ...]
    group: int | None
    symmetric: bool
    transposed: bool = False
    axis: int = 1
    order: tuple[int, ...] = IN_ORDER
    zeros_less: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all tensors that a matrix must have."""
        return tuple(filter(None, (self.codes, self.scales, self.zeros)))

    @property
    def format(self) -> str:
        """The packed format of most checkpoints of this kind, for where no tensors are at hand."""
        if not self.symmetric:
            return "q5_0"
        return "q4_0" if self.transposed else "int4"

    def matrices(self, entries: Mapping[str, Entry]) -> Iterator[tuple[str, MatrixEntry]]:
        """See `Scheme`."""
        for name in entries:
            if name.endswith(f".{self.codes}"):
                module = name.removesuffix(f".{self.codes}")
                names = {part: f"{module}.{part}" for part in (*self.parts, *self.others)}
                parts = {part: entries[name] for part, name in names.items() if name in entries}
                yield f"{module}.weight", CodesEntry.of(module, parts, self)


@dataclass(frozen=True)
class CodesEntry(MatrixEntry):
    """A matrix made of codes and scales. The bytes are those of its codes."""

    scheme: CodesScheme = field(kw_only=True)
    parts: Mapping[str, Entry] = field(kw_only=True)

    @classmethod
    def of(cls, module: str, parts: Mapping[str, Entry], scheme: CodesScheme) -> CodesEntry:
        """Raises `WeightsError` for parts that are missing or do not fit each other."""
        words = parts[scheme.codes]
        for part in scheme.parts:
            if part not in parts:
                raise WeightsError(f"{words.path}: tensor {module}.{part} is missing: fetch all files again")
            _require(part == scheme.scales, module, part, parts[part])
        stored = [size * 8 if axis == scheme.axis else size for axis, size in enumerate(words.shape)]
        rows, inputs = stored[::-1] if scheme.transposed else stored
        wanted = (rows, -(-inputs // scheme.group) if scheme.group else 1)
        scales = parts[scheme.scales]
        shapes = {scheme.scales: wanted[::-1] if scheme.transposed else wanted}
        if scheme.zeros:
            shapes[scheme.zeros] = (wanted[1], -(-rows // 8))
        for part, shape in shapes.items():
            if parts[part].shape != shape:
                raise WeightsError(
                    f"{words.path}: tensor {module}.{part} has shape {reprlib.repr(list(parts[part].shape))}; codes "
                    f"and config.json ask for {list(shape)}: one of them belongs to another model"
                )
        format = "q5_0" if not scheme.symmetric else "int4" if scales.dtype == "BF16" else "q4_0"
        return cls(words.path, format, (rows, inputs), words.start, words.end, scheme=scheme, parts=parts)

    def source(self, name: str, start: int, count: int, step: int) -> Source:
        return CodesSource(name, self, start, count, step)


def _require(is_scales: bool, module: str, part: str, entry: Entry) -> None:
    allowed = _HALVES if is_scales else (_WORD,)
    if entry.dtype not in allowed or len(entry.shape) != 2:
        raise WeightsError(
            f"{entry.path}: tensor {module}.{part} is {entry.dtype:.40} of {len(entry.shape)} dimensions; it must be "
            f"{' or '.join(allowed)} of 2: take another checkpoint"
        )


@dataclass(frozen=True)
class CodesSource(Source):
    """Rows of such a matrix."""

    entry: CodesEntry

    @property
    def published(self) -> str:  # type: ignore[override]
        return self.entry.dtype

    @property
    def straight(self) -> bool:
        return self.step == 1 and self.start % BLOCK == 0

    def floats(self, start: int, stop: int) -> Floats:
        codes, scales = self._codes_and_scales(start, stop)
        wide = np.repeat(scales.astype(np.float32), GROUP, axis=1)[:, : codes.shape[1]]
        values: Floats = (codes.astype(np.float32) - np.float32(self._offset)) * wide
        return values

    def blocks(self, start: int, stop: int) -> Bytes:
        codes, scales = self._codes_and_scales(start, stop)
        if self.published == "int4":
            return INT4.pack_blocks(codes, scales)
        return (Q5_0 if self.published == "q5_0" else Q4_0).pack_blocks(codes, scales)

    @property
    def _offset(self) -> int:
        return 2 * MIDDLE if self.published == "q5_0" else MIDDLE

    def _codes_and_scales(self, start: int, stop: int) -> tuple[Bytes, Array]:
        """Codes [rows, inputs] as the packed format has them, and a scale for each 32 inputs."""
        rows = slice(self.start + start * self.step, self.start + (stop - 1) * self.step + 1, self.step)
        if self.entry.scheme.transposed:
            codes, scales = (np.ascontiguousarray(part[rows]) for part in self._whole)
        else:
            codes, scales = self._straight_rows(rows)
        inputs = self.entry.shape[1]
        each = -(-(self.entry.scheme.group or inputs) // GROUP)
        return codes, np.repeat(scales, each, axis=1)[:, : -(-inputs // GROUP)]

    def _straight_rows(self, rows: slice) -> tuple[Bytes, Array]:
        if rows.start == 0:  # once for a matrix
            self._require_shape()
        scheme = self.entry.scheme
        return unpacked(self._part(scheme.codes, rows), 1, scheme.order), self._part(scheme.scales, rows)

    @cached_property
    def _whole(self) -> tuple[Bytes, Array]:
        """All rows, whose values lie scattered over the tensors."""
        scheme, inputs = self.entry.scheme, self.entry.shape[1]
        self._require_group_order()
        codes = unpacked(self._part(scheme.codes), scheme.axis, scheme.order).T
        scales = self._part(scheme.scales).T
        if scheme.zeros is None:
            return codes, scales
        stored = unpacked(self._part(scheme.zeros), 1, scheme.order).T[: len(codes)]
        if scheme.symmetric:
            # Some programs store what they are in either version, whatever config.json calls it.
            if not any((stored == zero).all() for zero in (MIDDLE - 1, MIDDLE)):
                self._refuse("has zeros other than 8, and config.json calls its codes symmetric")
            return codes, scales
        zeros = stored + np.uint8(scheme.zeros_less) & np.uint8(15)
        try:
            scales = scales if scales.dtype == np.float16 else exact_halves(scales)
        except ValueError as error:
            self._refuse(str(error))
        return codes + np.uint8(2 * MIDDLE) - np.repeat(zeros, scheme.group or inputs, axis=1)[:, :inputs], scales

    def _part(self, name: str, rows: slice = slice(None)) -> Array:
        """Rows of a tensor: words as uint32, scales in their own type."""
        entry = self.entry.parts[name]
        dtype = np.dtype(FLOATS.get(entry.dtype, np.uint32))
        first, last, step = rows.indices(entry.shape[0])
        size = entry.shape[1] * dtype.itemsize
        found: Array = read_bytes(entry, first * size, last * size).view(dtype).reshape(-1, entry.shape[1])[::step]
        return found

    def _require_shape(self) -> None:
        """What `weight_shape` says, if it is there, must be what the words hold."""
        stored = self._integers("weight_shape")
        if stored is not None and stored != list(self.entry.shape):
            self._refuse(f"has the weight_shape {stored[:4]}, and codes for {list(self.entry.shape)}")

    def _require_group_order(self) -> None:
        group = self.entry.scheme.group or self.entry.shape[1]
        stored = self._integers("g_idx")
        if stored is not None and stored != [i // group for i in range(self.entry.shape[1])]:
            self._refuse("has its inputs ordered by activations (desc_act), which is not read")

    def _integers(self, name: str) -> list[int] | None:
        entry = self.entry.parts.get(name)
        if entry is None or entry.dtype not in ("I32", "I64"):
            return None
        dtype = np.int32 if entry.dtype == "I32" else np.int64
        found: list[int] = read_bytes(entry, 0, entry.end - entry.start).view(dtype).tolist()
        return found

    def _refuse(self, reason: str) -> NoReturn:
        raise WeightsError(f"{self.entry.path}: tensor {self.name} {reason}: take another checkpoint")


def unpacked(words: Array, axis: int, order: tuple[int, ...]) -> Bytes:
    """The codes of words [rows, columns], eight of each along an axis."""
    codes = (words[..., None] >> _SHIFTS & np.uint32(15)).astype(np.uint8)[..., np.argsort(order)]
    moved = codes.transpose(0, 2, 1) if axis == 0 else codes
    return np.ascontiguousarray(moved).reshape((-1, words.shape[1]) if axis == 0 else (len(words), -1))


def read_group(fields: Fields) -> int | None:
    """Inputs that share a scale, None for all."""
    size = fields.size("group_size", default=-1, minimum=-1)
    if size == -1:
        return None
    if size < GROUP or size % GROUP:
        raise ConfigError(
            f"config.json: group_size is {size}; it must be a multiple of {GROUP}, or -1: take another checkpoint"
        )
    return size
